"""Gemma 3, its text decoder (Gemma Team 2025, arXiv:2503.19786): five sliding layers to a full one, a rotary base for
each kind, norms on the heads of queries and keys."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import every
from llm_jax.models.families.gemma import Gemma2Like
from llm_jax.models.families.rope import of_full_layers, parameters_by_kind


class Gemma3Text(Gemma2Like):
    MODEL_TYPE = "gemma3_text"
    ARCHITECTURE = "Gemma3ForCausalLM"
    STEM = "Gemma3Text"
    FIELDS = {
        **Gemma2Like.FIELDS,
        "vocab_size": ("vocab_size", 262208),
        "max_position_embeddings": ("max_position_embeddings", 131072),
        "logit_softcap": ("final_logit_softcapping", None),
        "attention_softcap": ("attn_logit_softcapping", None),
    }
    CONSTANTS = {**Gemma2Like.CONSTANTS, "qk_norm": "head"}
    ALIASES = {"_sliding_window_pattern": "sliding_window_pattern"}
    THETA = 1e6
    LAYER = {
        **Gemma2Like.LAYER,
        "attention/q_norm": "self_attn.q_norm",
        "attention/k_norm": "self_attn.k_norm",
    }

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"sliding_window_pattern", "rope_local_base_freq"}

    def default_sights(self, hf: Mapping[str, Any], layers: int) -> list[str]:
        pattern = typed(int, hf.get("sliding_window_pattern", 6), "config.json: sliding_window_pattern")
        return every(max(pattern, 1), "full", "sliding", layers)

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        flat, theta = of_full_layers(hf, values, "rope_local_base_freq", 10000.0)
        return super().derived(flat, values) | {"local_rope_theta": theta}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        own = {"rope_parameters": parameters_by_kind(config), "rope_local_base_freq": config.local_rope_theta}
        return super().written(config) | own


FAMILY = Gemma3Text()
