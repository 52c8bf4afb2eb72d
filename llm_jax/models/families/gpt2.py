"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, projections stored as [inputs, outputs]."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import Family
from llm_jax.models.families.heads import OUTSIDE


class Gpt2(Family):
    MODEL_TYPE = "gpt2"
    ARCHITECTURE = "GPT2LMHeadModel"
    FIELDS = {
        "vocab_size": ("vocab_size", 50257),
        "hidden_size": ("n_embd", 768),
        "num_layers": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "max_position_embeddings": ("n_positions", 1024),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "activation": ("activation_function", "gelu_new"),
        "scale_by_depth": ("scale_attn_by_inverse_layer_idx", False),
        "init_std": ("initializer_range", 0.02),
    }
    CONSTANTS = {
        "positions": "learned",
        "norm": "layer",
        "attention_bias": True,
        "mlp_bias": True,
        "gated": False,
        "depth_scaled_init": True,
    }
    CARRIED = {
        "reorder_and_upcast_attn",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "n_ctx",
        "gradient_checkpointing",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    }
    ALIASES = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"}
    TOKENS = {"bos_token_id": 50256, "eos_token_id": 50256}
    TOP = {
        "embed": "transformer.wte",
        "position_embed": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }
    SCORE = {"sequence": "score", "token": "classifier"}
    PREFIX = "transformer.h."
    LAYER = {
        "attention_norm": "ln_1",
        "attention/o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    }
    FUSED = {"attn.c_attn": ("attention/q", "attention/k", "attention/v")}
    TRANSPOSED = False

    def derived_fields(self) -> set[str]:
        return {"n_inner", "scale_attn_weights"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        inner = typed(int | None, hf.get("n_inner"), "config.json: n_inner")
        scaled = typed(bool, hf.get("scale_attn_weights", True), "config.json: scale_attn_weights")
        return {
            "intermediate_size": 4 * values["hidden_size"] if inner is None else inner,
            "query_scale": None if scaled else 1.0,
        }

    def written(self, config: ModelConfig) -> dict[str, Any]:
        return {"n_inner": config.intermediate_size, "scale_attn_weights": config.query_scale is None}

    def canonical(self, name: str) -> str:
        return name if name.startswith(("transformer.", *OUTSIDE)) else f"transformer.{name}"

    def is_derived(self, name: str, config: ModelConfig) -> bool:
        return name.endswith((".attn.bias", ".attn.masked_bias")) or super().is_derived(name, config)


FAMILY = Gpt2()
