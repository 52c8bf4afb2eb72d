"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060)."""

import math
from collections.abc import Mapping
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.state_space import STEPS, StateSpace, read_limits, write_limits


class Mamba2(StateSpace):
    MODEL_TYPE = "mamba2"
    ARCHITECTURE = "Mamba2ForCausalLM"
    MIXER = "mamba2"
    FIELDS = {
        **StateSpace.FIELDS,
        "vocab_size": ("vocab_size", 32768),
        "hidden_size": ("hidden_size", 4096),
        "num_layers": ("num_hidden_layers", 64),
        "tie_embeddings": ("tie_word_embeddings", False),
    }
    MAMBA = {
        "state_size": ("state_size", 128),
        "conv_width": ("conv_kernel", 4),
        "conv_bias": ("use_conv_bias", True),
        "bias": ("use_bias", False),
        "num_heads": ("num_heads", 128),
        "num_groups": ("n_groups", 8),
        **STEPS,
    }
    CARRIED = StateSpace.CARRIED | {"time_step_rank"}
    LAYER = {
        "attention_norm": "norm",
        "mamba2/rates/dt_bias": "mixer.dt_bias",
        "mamba2/rates/A_log": "mixer.A_log",
        "mamba2/rates/skip": "mixer.D",
        "mamba2/norm": "mixer.norm",
        "mamba2/o": "mixer.out_proj",
    }
    FUSED = {
        "mixer.in_proj": ("mamba2/gate", "mamba2/x", "mamba2/bc", "mamba2/dt"),
        "mixer.conv1d": ("mamba2/x_conv", "mamba2/bc_conv"),
    }

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"head_dim", "time_step_limit"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        found = super().derived(hf, values)
        mamba, said = found["mamba"], hf.get("head_dim", 64)
        if said * mamba.num_heads != mamba.inner_size:
            heads = f"head_dim={said!r} times num_heads={mamba.num_heads}"
            raise UserError(f"config.json: {heads} is not expand * hidden_size, {mamba.inner_size}")
        return found

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        limits = read_limits(hf.get("time_step_limit", (0.0, math.inf)))
        return {**limits, "norm_eps": values["norm_eps"]}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        mamba = config.mamba
        return super().written(config) | {"head_dim": mamba.head_dim, "time_step_limit": write_limits(mamba)}


FAMILY = Mamba2()
