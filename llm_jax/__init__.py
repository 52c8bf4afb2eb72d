"""One codebase for the whole life of a language model. The public names below load on first use."""

from typing import TYPE_CHECKING

from llm_jax.base.lazy import lazy_exports

if TYPE_CHECKING:
    from llm_jax.adapters.loading import load as load
    from llm_jax.adapters.loading import save as save
    from llm_jax.inference.config import SamplingParams as SamplingParams
    from llm_jax.jobs.answer_scores import compare as compare
    from llm_jax.jobs.answer_scores import score as score
    from llm_jax.jobs.answer_scores import step_scores as step_scores
    from llm_jax.models.loading import Model as Model
    from llm_jax.sharding.config import MeshConfig as MeshConfig

__getattr__ = lazy_exports(
    globals(),
    {
        "load": "llm_jax.adapters.loading",
        "save": "llm_jax.adapters.loading",
        "Model": "llm_jax.models.loading",
        "score": "llm_jax.jobs.answer_scores",
        "compare": "llm_jax.jobs.answer_scores",
        "step_scores": "llm_jax.jobs.answer_scores",
        "MeshConfig": "llm_jax.sharding.config",
        "SamplingParams": "llm_jax.inference.config",
        "inference": "llm_jax.inference:*",
        "kernels": "llm_jax.kernels:*",
        "objectives": "llm_jax.objectives:*",
        "adapters": "llm_jax.adapters:*",
    },
)
