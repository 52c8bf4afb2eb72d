"""Llama 1 to 3.3 (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783)."""

from llm_jax.models.families.base import Family


class Llama(Family):
    MODEL_TYPE = "llama"
    ARCHITECTURE = "LlamaForCausalLM"
    FIELDS = {
        "vocab_size": ("vocab_size", 32000),
        "hidden_size": ("hidden_size", 4096),
        "intermediate_size": ("intermediate_size", 11008),
        "num_layers": ("num_hidden_layers", 32),
        "num_heads": ("num_attention_heads", 32),
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "activation": ("hidden_act", "silu"),
        "init_std": ("initializer_range", 0.02),
    }
    FIXED = {"pretraining_tp": (1, None), "rope_interleaved": (False, None)}
    CARRIED = {"is_llama_config"}
    LAYER = {
        "attention_norm": "input_layernorm",
        "attention/q": "self_attn.q_proj",
        "attention/k": "self_attn.k_proj",
        "attention/v": "self_attn.v_proj",
        "attention/o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }


FAMILY = Llama()
