"""Losses as pure functions of arrays, named as in their papers. No model, no mesh, no batch layout in sight."""

from typing import TYPE_CHECKING

from llm_jax.base.lazy import lazy_exports

if TYPE_CHECKING:
    from llm_jax.objectives.experts import bias_update as bias_update
    from llm_jax.objectives.experts import importance as importance
    from llm_jax.objectives.experts import load as load
    from llm_jax.objectives.experts import load_balance as load_balance
    from llm_jax.objectives.experts import router_z as router_z
    from llm_jax.objectives.experts import sequence_balance as sequence_balance
    from llm_jax.objectives.preference.divergence import f_divergence as f_divergence
    from llm_jax.objectives.preference.dpo import dpo as dpo
    from llm_jax.objectives.preference.ipo import ipo as ipo
    from llm_jax.objectives.preference.shared import implicit_rewards as implicit_rewards
    from llm_jax.objectives.tokens import sft as sft

# A file bears its function's name one level deeper only: importing a module `objectives.dpo` would put it in the
# function's place.
__getattr__ = lazy_exports(
    globals(),
    {
        "bias_update": "llm_jax.objectives.experts",
        "importance": "llm_jax.objectives.experts",
        "load": "llm_jax.objectives.experts",
        "load_balance": "llm_jax.objectives.experts",
        "router_z": "llm_jax.objectives.experts",
        "sequence_balance": "llm_jax.objectives.experts",
        "f_divergence": "llm_jax.objectives.preference.divergence",
        "dpo": "llm_jax.objectives.preference.dpo",
        "ipo": "llm_jax.objectives.preference.ipo",
        "implicit_rewards": "llm_jax.objectives.preference.shared",
        "sft": "llm_jax.objectives.tokens",
    },
)
