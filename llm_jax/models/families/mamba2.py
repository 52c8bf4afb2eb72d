"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060)."""

from llm_jax.models.families.state_space import StateSpace
from llm_jax.models.families.states import STEPS, WithMamba2, mamba2_fused, mamba2_names


class Mamba2(WithMamba2, StateSpace):
    MODEL_TYPE = "mamba2"
    ARCHITECTURE = "Mamba2ForCausalLM"
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
    HEAD_DIM = ("head_dim", 64)
    CARRIED = StateSpace.CARRIED | {"time_step_rank"}
    LAYER = {"attention_norm": "norm", **mamba2_names("mixer")}
    FUSED = mamba2_fused("mixer")


FAMILY = Mamba2()
