"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): norms on the heads of queries and keys, biases only where said."""

from llm_jax.models.families.llama import Llama
from llm_jax.models.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    MODEL_TYPE = "qwen3"
    ARCHITECTURE = "Qwen3ForCausalLM"
    FIELDS = {
        **Qwen2.FIELDS,
        "attention_bias": ("attention_bias", False),
        "head_dim": ("head_dim", 128),
    }
    CONSTANTS = {"qk_norm": "head"}
    LAYER = {**Llama.LAYER, "attention/q_norm": "self_attn.q_norm", "attention/k_norm": "self_attn.k_norm"}


FAMILY = Qwen3()
