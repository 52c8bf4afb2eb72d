"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): many small experts, norms on whole queries and keys."""

from llm_jax.models.families.experts import WithExperts
from llm_jax.models.families.llama import Llama

MLP = {
    "mlp/gate": "mlp.experts.{}.gate_proj",
    "mlp/up": "mlp.experts.{}.up_proj",
    "mlp/down": "mlp.experts.{}.down_proj",
}
MLP_AT_ONCE = {"mlp.experts.gate_up_proj": ("mlp/gate", "mlp/up"), "mlp.experts.down_proj": ("mlp/down",)}


class Olmoe(WithExperts, Llama):
    MODEL_TYPE = "olmoe"
    ARCHITECTURE = "OlmoeForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name not in ("mlp_bias", "head_dim")},
        "vocab_size": ("vocab_size", 50304),
        "hidden_size": ("hidden_size", 2048),
        "intermediate_size": ("intermediate_size", 2048),
        "num_layers": ("num_hidden_layers", 16),
        "num_heads": ("num_attention_heads", 16),
        "max_position_embeddings": ("max_position_embeddings", 4096),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "qkv_clip": ("clip_qkv", None),
    }
    CONSTANTS = {"qk_norm": "whole"}
    TOKENS = {"eos_token_id": 50279}
    ALIASES = {"num_local_experts": "num_experts"}
    EXPERTS = {
        "num": ("num_experts", 64),
        "top_k": ("num_experts_per_tok", 8),
        "normalize": ("norm_topk_prob", False),
    }
    LAYER = {
        **{ours: theirs for ours, theirs in Llama.LAYER.items() if not ours.startswith("mlp/")},
        "attention/q_norm": "self_attn.q_norm",
        "attention/k_norm": "self_attn.k_norm",
        "mlp/router": "mlp.gate",
    }
    EACH = MLP
    ALL = MLP_AT_ONCE


FAMILY = Olmoe()
