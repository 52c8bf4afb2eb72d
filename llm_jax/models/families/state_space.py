"""Models of state-space layers alone."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.models.config import Mixer
from llm_jax.models.families.states import WithStates


class StateSpace(WithStates):
    """A norm and a mixer in each layer, no feed-forward, no positions."""

    FIELDS = {
        "vocab_size": ("vocab_size", 50280),
        "hidden_size": ("hidden_size", 768),
        "num_layers": ("num_hidden_layers", 32),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "init_std": ("initializer_range", 0.1),
    }
    CONSTANTS = {
        "positions": "none",
        # Of layers that these models have not.
        "num_heads": 1,
        "intermediate_size": 1,
        # A state takes texts of any length.
        "max_position_embeddings": 2**20,
    }
    FIXED = {"rms_norm": (True, None), "ssm_cfg": ({}, None)}
    CARRIED = {
        "residual_in_fp32",
        "rescale_prenorm_residual",
        "fused_add_norm",
        "pad_vocab_size_multiple",
        "time_step_init_scheme",
        "time_step_scale",
        "use_mambapy",
        "use_falcon_mambapy",
        "use_associative_scan",
        "chunk_size",
    }
    EXPAND = "expand"
    TOP = {"embed": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"}
    PREFIX = "backbone.layers."

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"intermediate_size"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        return super().derived(hf, values) | {"feed_forwards": ("none",) * values["num_layers"]}

    def mixers(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Mixer, ...]:
        return (self.MIXER,) * values["num_layers"]

    def inner_size(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> int:
        inner = super().inner_size(hf, values)
        if hf.get("intermediate_size") not in (None, inner):
            raise UserError(f"config.json: intermediate_size={hf['intermediate_size']!r} is not expand * hidden_size")
        return inner

    def canonical(self, name: str) -> str:
        return name.replace("backbone.embedding.", "backbone.embeddings.")
