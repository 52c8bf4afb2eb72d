"""Mamba (Gu & Dao 2023, arXiv:2312.00752)."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.state_space import StateSpace
from llm_jax.models.families.states import STEPS, WithMamba, mamba_fused, mamba_names

INNER = "intermediate_size"


class Mamba(WithMamba, StateSpace):
    MODEL_TYPE = "mamba"
    ARCHITECTURE = "MambaForCausalLM"
    MAMBA = {
        "state_size": ("state_size", 16),
        "conv_width": ("conv_kernel", 4),
        "conv_bias": ("use_conv_bias", True),
        "bias": ("use_bias", False),
        **STEPS,
    }
    RANK = "time_step_rank"
    LAYER = {"attention_norm": "norm", **mamba_names("mixer")}
    FUSED = mamba_fused("mixer")

    def inner_size(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> int:
        """`intermediate_size` where config.json has one: Falcon-Mamba's says 8192, and `expand` that it is 65536."""
        said = hf.get(INNER)
        return super().inner_size(hf, values) if said is None else typed(int, said, f"config.json: {INNER}")

    def written(self, config: ModelConfig) -> dict[str, Any]:
        return super().written(config) | {INNER: config.mamba.inner_size}


FAMILY = Mamba()
