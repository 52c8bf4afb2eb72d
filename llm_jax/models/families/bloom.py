"""BLOOM (BigScience 2022, arXiv:2211.05100): ALiBi, a norm on token vectors, a tied head."""

from collections.abc import Mapping
from typing import Any

from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import Family
from llm_jax.models.families.heads import OUTSIDE
from llm_jax.models.families.tensors import Form


class Bloom(Family):
    MODEL_TYPE = "bloom"
    ARCHITECTURE = "BloomForCausalLM"
    FIELDS = {
        "vocab_size": ("vocab_size", 250880),
        "hidden_size": ("hidden_size", 64),
        "num_layers": ("n_layer", 2),
        "num_heads": ("n_head", 8),
        "max_position_embeddings": ("seq_length", 2048),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "residual_normed": ("apply_residual_connection_post_layernorm", False),
        "init_std": ("initializer_range", 0.02),
    }
    CONSTANTS = {
        "positions": "alibi",
        "norm": "layer",
        "embed_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
        "gated": False,
        "activation": "gelu_tanh",
    }
    CARRIED = {
        "hidden_dropout",
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "unk_token_id",
        "pretraining_tp",
        "slow_but_exact",
        "n_inner",
    }
    ALIASES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    TOP = {
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }
    SCORE = {"sequence": "score", "token": "classifier"}
    PREFIX = "transformer.h."
    LAYER = {
        "attention_norm": "input_layernorm",
        "attention/o": "self_attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp/up": "mlp.dense_h_to_4h",
        "mlp/down": "mlp.dense_4h_to_h",
    }
    FUSED = {"self_attention.query_key_value": ("attention/q", "attention/k", "attention/v")}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        return {"intermediate_size": 4 * values["hidden_size"]}

    def fused_form(self, theirs: str, config: ModelConfig) -> Form:
        """Head by head: its query, key and value."""
        return Form(transposed=True, groups=config.num_heads)

    def canonical(self, name: str) -> str:
        return name if name.startswith(("transformer.", *OUTSIDE)) else f"transformer.{name}"


FAMILY = Bloom()
