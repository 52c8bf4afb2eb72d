"""Gemma (Gemma Team 2024, arXiv:2403.08295): norms with weights less 1, scaled token vectors, GeGLU, tied head."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import KNOWN_ACTIVATIONS, every, near, read_sights, write_sights
from llm_jax.models.families.llama import Llama


class Gemma(Llama):
    MODEL_TYPE = "gemma"
    ARCHITECTURE = "GemmaForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name != "mlp_bias"},
        "vocab_size": ("vocab_size", 256000),
        "hidden_size": ("hidden_size", 3072),
        "intermediate_size": ("intermediate_size", 24576),
        "num_layers": ("num_hidden_layers", 28),
        "num_heads": ("num_attention_heads", 16),
        "num_kv_heads": ("num_key_value_heads", 16),
        "head_dim": ("head_dim", 256),
        "max_position_embeddings": ("max_position_embeddings", 8192),
        "tie_embeddings": ("tie_word_embeddings", True),
        "activation": ("hidden_act", "gelu_pytorch_tanh"),
    }
    CONSTANTS = {"norm": "rms_offset"}
    FIXED = {"use_bidirectional_attention": (None, False)}
    # The first folders say "gelu" and mean its approximation by tanh.
    ACTIVATIONS = {**KNOWN_ACTIVATIONS, "gelu": "gelu_tanh"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        return super().derived(hf, values) | {"embed_scale": values["hidden_size"] ** 0.5}


class Gemma2Like(Gemma):
    """What Gemma 2 and 3 share: norms on both sides of a sublayer, soft caps, a query scale, sliding layers."""

    FIELDS = {
        **Gemma.FIELDS,
        "hidden_size": ("hidden_size", 2304),
        "intermediate_size": ("intermediate_size", 9216),
        "num_layers": ("num_hidden_layers", 26),
        "num_heads": ("num_attention_heads", 8),
        "num_kv_heads": ("num_key_value_heads", 4),
        "activation": ("hidden_activation", "gelu_pytorch_tanh"),
        "window": ("sliding_window", 4096),
    }
    CONSTANTS = {**Gemma.CONSTANTS, "norm_at": "sandwich"}
    CARRIED = {"hidden_act"}
    ACTIVATIONS = KNOWN_ACTIVATIONS
    LAYER = {
        **Gemma.LAYER,
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"query_pre_attn_scalar", "layer_types"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        scalar = typed(float, hf.get("query_pre_attn_scalar", 256), "config.json: query_pre_attn_scalar")
        if scalar <= 0:
            raise UserError(f"config.json: query_pre_attn_scalar={scalar}, it has to be positive")
        default = self.default_sights(hf, values["num_layers"])
        return super().derived(hf, values) | {"query_scale": scalar**-0.5, "sights": read_sights(hf, default)}

    def default_sights(self, hf: Mapping[str, Any], layers: int) -> list[str]:
        """Where config.json has no `layer_types`."""
        return every(2, "full", "sliding", layers)

    def written(self, config: ModelConfig) -> dict[str, Any]:
        scale = config.query_scale or config.head_dim**-0.5  # type: ignore[operator]
        return super().written(config) | {"query_pre_attn_scalar": near(scale**-2)} | write_sights(config)


FAMILY = Gemma()
