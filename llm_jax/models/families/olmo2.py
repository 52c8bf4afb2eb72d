"""OLMo 2 (OLMo Team 2025, arXiv:2501.00656): norms on what sublayers give, and on all queries and all keys at once."""

from llm_jax.models.families.llama import Llama


class Olmo2(Llama):
    MODEL_TYPE = "olmo2"
    ARCHITECTURE = "Olmo2ForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name != "mlp_bias"},
        "vocab_size": ("vocab_size", 50304),
        "norm_eps": ("rms_norm_eps", 1e-5),
    }
    CONSTANTS = {"norm_at": "output", "qk_norm": "whole"}
    TOKENS = {"eos_token_id": 50279}
    LAYER = {
        **{name: theirs for name, theirs in Llama.LAYER.items() if not name.endswith("_norm")},
        "attention/q_norm": "self_attn.q_norm",
        "attention/k_norm": "self_attn.k_norm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }


FAMILY = Olmo2()
