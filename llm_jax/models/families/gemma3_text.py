"""Gemma 3, its text decoder (Gemma Team 2025, arXiv:2503.19786): five sliding layers to a full one, a rotary base for
each kind, norms on the heads of queries and keys."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import every
from llm_jax.models.families.gemma import Gemma2Like
from llm_jax.models.families.rope import rope_fields, rope_parameters


class Gemma3Text(Gemma2Like):
    MODEL_TYPE = "gemma3_text"
    ARCHITECTURE = "Gemma3ForCausalLM"
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
        rope = typed(dict[str, Any] | None, hf.get("rope_parameters"), "config.json: rope_parameters") or {}
        old = typed(dict[str, Any] | None, hf.get("rope_scaling"), "config.json: rope_scaling") or {}
        local = rope.get("sliding_attention") or {}
        where = f"config.json: rope_parameters={rope!r}"
        if rope_fields(local, {}, values, 1.0, where).get("rope_scaling") is not None:
            raise UserError(f"{where}: sliding layers with a scaling are not supported")
        flat = {**(rope.get("full_attention") or {}), **old}
        theta = local.get("rope_theta", hf.get("rope_local_base_freq", 10000.0))
        found = super().derived({**hf, "rope_parameters": flat, "rope_scaling": None}, values)
        return found | {"local_rope_theta": typed(float, theta, "config.json: rope_local_base_freq")}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        both = {"full_attention": rope_parameters(config), "sliding_attention": local}
        return super().written(config) | {"rope_parameters": both, "rope_local_base_freq": config.local_rope_theta}


FAMILY = Gemma3Text()
