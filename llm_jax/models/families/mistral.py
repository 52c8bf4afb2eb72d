"""Mistral (Jiang et al. 2023, arXiv:2310.06825): a Llama with a window and without biases."""

from llm_jax.models.families.llama import Llama


class Mistral(Llama):
    MODEL_TYPE = "mistral"
    ARCHITECTURE = "MistralForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if not name.endswith("_bias")},
        "intermediate_size": ("intermediate_size", 14336),
        "num_kv_heads": ("num_key_value_heads", 8),
        "max_position_embeddings": ("max_position_embeddings", 4096 * 32),
        "window": ("sliding_window", 4096),
    }


FAMILY = Mistral()
