"""Losses as pure functions of arrays, named as in their papers. No model, no mesh, no batch layout in sight."""

from typing import TYPE_CHECKING

from llm_jax.base.lazy import lazy_exports

if TYPE_CHECKING:
    from llm_jax.objectives.pairs import dpo as dpo
    from llm_jax.objectives.pairs import implicit_rewards as implicit_rewards
    from llm_jax.objectives.pairs import ipo as ipo
    from llm_jax.objectives.tokens import sft as sft

# No file bears its function's name: importing a module `objectives.dpo` would put it in the function's place.
__getattr__ = lazy_exports(
    globals(),
    {
        "dpo": "llm_jax.objectives.pairs",
        "implicit_rewards": "llm_jax.objectives.pairs",
        "ipo": "llm_jax.objectives.pairs",
        "sft": "llm_jax.objectives.tokens",
    },
)
