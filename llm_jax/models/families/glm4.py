"""GLM-4-0414 (THUDM 2025): norms on both sides of sublayers, half of each head turned, by neighbours."""

from llm_jax.models.families.llama import Llama


class Glm4(Llama):
    MODEL_TYPE = "glm4"
    ARCHITECTURE = "Glm4ForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name != "mlp_bias"},
        "vocab_size": ("vocab_size", 151552),
        "intermediate_size": ("intermediate_size", 13696),
        "num_layers": ("num_hidden_layers", 40),
        "num_kv_heads": ("num_key_value_heads", 2),
        "head_dim": ("head_dim", 128),
        "max_position_embeddings": ("max_position_embeddings", 131072),
        "norm_eps": ("rms_norm_eps", 1.5625e-07),
        "attention_bias": ("attention_bias", True),
    }
    CONSTANTS = {"norm_at": "sandwich", "rope_interleaved": True, "output_bias": False}
    LAYER = {
        **Llama.LAYER,
        "attention_out_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_mlp_layernorm",
    }
    FUSED = {"mlp.gate_up_proj": ("mlp/gate", "mlp/up")}
    PARTIAL = 0.5
    TOKENS = {"pad_token_id": 151329}


FAMILY = Glm4()
