"""LoRA: low-rank updates beside a model's weights, trained alone, in PEFT's files. Read `places.py` and `lora.py`."""

from typing import TYPE_CHECKING

from llm_jax.base.lazy import lazy_exports

if TYPE_CHECKING:
    from llm_jax.adapters.adapters import Adapters as Adapters
    from llm_jax.adapters.combining import combine as combine
    from llm_jax.adapters.config import LoraConfig as LoraConfig
    from llm_jax.adapters.loading import AdaptedModel as AdaptedModel
    from llm_jax.adapters.loading import load as load
    from llm_jax.adapters.loading import load_merged as load_merged
    from llm_jax.adapters.loading import save as save
    from llm_jax.adapters.sites import Adaptation as Adaptation

__getattr__ = lazy_exports(
    globals(),
    {
        "Adapters": "llm_jax.adapters.adapters",
        "combine": "llm_jax.adapters.combining",
        "LoraConfig": "llm_jax.adapters.config",
        "AdaptedModel": "llm_jax.adapters.loading",
        "load": "llm_jax.adapters.loading",
        "load_merged": "llm_jax.adapters.loading",
        "save": "llm_jax.adapters.loading",
        "Adaptation": "llm_jax.adapters.sites",
    },
)
