"""Mamba (Gu & Dao 2023, arXiv:2312.00752)."""

import math
from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.state_space import STEPS, StateSpace


class Mamba(StateSpace):
    MODEL_TYPE = "mamba"
    ARCHITECTURE = "MambaForCausalLM"
    MIXER = "mamba"
    MAMBA = {
        "state_size": ("state_size", 16),
        "conv_width": ("conv_kernel", 4),
        "conv_bias": ("use_conv_bias", True),
        "bias": ("use_bias", False),
        **STEPS,
    }
    LAYER = {
        "attention_norm": "norm",
        "mamba/selection": "mixer.x_proj",
        "mamba/dt": "mixer.dt_proj",
        "mamba/rates/dt_bias": "mixer.dt_proj.bias",
        "mamba/rates/A_log": "mixer.A_log",
        "mamba/rates/skip": "mixer.D",
        "mamba/o": "mixer.out_proj",
    }
    FUSED = {"mixer.in_proj": ("mamba/x", "mamba/gate"), "mixer.conv1d": ("mamba/conv",)}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"time_step_rank"}

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        rank = hf.get("time_step_rank", "auto")
        if rank == "auto":
            rank = math.ceil(values["hidden_size"] / 16)
        return {"dt_rank": typed(int, rank, "config.json: time_step_rank")}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        return super().written(config) | {
            "time_step_rank": config.mamba.dt_rank,
            "intermediate_size": config.mamba.inner_size,
        }


FAMILY = Mamba()
