"""gpt-oss (OpenAI 2025, arXiv:2508.10925): attention sinks, windows in every other layer, experts with biases and a
clamped SwiGLU, YaRN unless said otherwise."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import every, read_sights, write_sights
from llm_jax.models.families.fused_experts import WithFusedExperts
from llm_jax.models.families.llama import Llama

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What transformers takes where config.json says nothing of it."""


class GptOss(WithFusedExperts, Llama):
    MODEL_TYPE = "gpt_oss"
    ARCHITECTURE = "GptOssForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name not in ("mlp_bias", "activation")},
        "vocab_size": ("vocab_size", 201088),
        "hidden_size": ("hidden_size", 2880),
        "intermediate_size": ("intermediate_size", 2880),
        "num_layers": ("num_hidden_layers", 36),
        "num_heads": ("num_attention_heads", 64),
        "num_kv_heads": ("num_key_value_heads", 8),
        "head_dim": ("head_dim", 64),
        "max_position_embeddings": ("max_position_embeddings", 131072),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "attention_bias": ("attention_bias", True),
        "window": ("sliding_window", 128),
    }
    CONSTANTS = {"sinks": True}
    # Its experts' activation is what `swiglu_alpha` and `swiglu_limit` say.
    CARRIED = WithFusedExperts.CARRIED | {"hidden_act", "initial_context_length"}
    ALIASES = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
    THETA = 150000.0
    EXPERTS = {
        "num": ("num_local_experts", 128),
        "top_k": ("num_experts_per_tok", 4),
        "alpha": ("swiglu_alpha", 1.702),
        "limit": ("swiglu_limit", 7.0),
    }
    EXPERTS_CONSTANTS = {"bias": True, "router_bias": True}
    LAYER = {
        **{ours: theirs for ours, theirs in Llama.LAYER.items() if not ours.startswith("mlp/")},
        "attention/sinks/weight": "self_attn.sinks",
        "mlp/router": "mlp.router",
    }
    ALL = {"mlp.experts.gate_up_proj": ("mlp/gate", "mlp/up"), "mlp.experts.down_proj": ("mlp/down",)}
    IN_TURN = True

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"layer_types"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        # Without one our experts would be plain, while null is no limit that transformers could work with.
        typed(float, hf.get("swiglu_limit", 7.0), "config.json: swiglu_limit")
        if hf.get("rope_parameters") is None and not hf.get("rope_scaling"):
            hf = {**hf, "rope_parameters": YARN}
        default = every(2, "full", "sliding", values["num_layers"])
        return super().derived(hf, values) | {"sights": read_sights(hf, default)}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        fields = super().written(config) | write_sights(config)
        # Older releases read no `rope_parameters`, and without a scaling take YaRN.
        return {"rope_scaling": {"rope_type": "default"}} | fields


FAMILY = GptOss()
