"""Mistral (Jiang et al. 2023, arXiv:2310.06825): `MistralForCausalLM`, a Llama with a window and without biases."""

from collections.abc import Mapping
from typing import Any

from llm_jax.models.config import ModelConfig
from llm_jax.models.families import llama
from llm_jax.models.families.llama import carried as carried
from llm_jax.models.families.llama import flops_per_token as flops_per_token
from llm_jax.models.families.llama import is_derived as is_derived
from llm_jax.models.families.llama import weight_names as weight_names

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"

# Ours -> (theirs, what transformers takes where the field is absent).
FIELDS: dict[str, tuple[str, Any]] = {
    **{name: how for name, how in llama.FIELDS.items() if not name.endswith("_bias")},
    "intermediate_size": ("intermediate_size", 14336),
    "num_kv_heads": ("num_key_value_heads", 8),
    "max_position_embeddings": ("max_position_embeddings", 4096 * 32),
    "window": ("sliding_window", 4096),
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The decoder's config. Raises UserError naming a field that the decoder does not honour."""
    return llama.read_config(hf, MODEL_TYPE, ARCHITECTURE, FIELDS)


def to_hf(config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that transformers reads as the same model."""
    return llama.write_config(config, extra, MODEL_TYPE, ARCHITECTURE, FIELDS)
