"""Falcon (Almazrouei et al. 2023, arXiv:2311.16867), its three layouts: 7B (one key head, one norm), 40B and 180B ("new
decoder architecture": key heads, a norm for attention and feed-forward each), RW (a key head per head, ALiBi).

With ALiBi transformers rounds biases to bfloat16, by absolute position; here they are exact. The two agree for slopes
that are powers of two (8 heads or fewer) up to position 256.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import Family
from llm_jax.models.families.heads import OUTSIDE
from llm_jax.models.families.rope import read_rope, write_rope
from llm_jax.models.families.tensors import Form

FLAGS = {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False}


class Falcon(Family):
    MODEL_TYPE = "falcon"
    ARCHITECTURE = "FalconForCausalLM"
    FIELDS = {
        "vocab_size": ("vocab_size", 65024),
        "hidden_size": ("hidden_size", 4544),
        "num_layers": ("num_hidden_layers", 32),
        "num_heads": ("num_attention_heads", 71),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "activation": ("activation", "gelu"),
        "init_std": ("initializer_range", 0.02),
    }
    CONSTANTS = {"norm": "layer", "gated": False}
    CARRIED = {"hidden_dropout"}
    ALIASES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
    TOP = {
        "embed": "transformer.word_embeddings",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }
    SCORE = {"sequence": "score", "token": "classifier"}
    PREFIX = "transformer.h."
    FUSED = {"self_attention.query_key_value": ("attention/q", "attention/k", "attention/v")}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | FLAGS.keys() | {"num_kv_heads", "num_ln_in_parallel_attn", "ffn_hidden_size"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        on = {name: typed(bool, hf.get(name, default), f"config.json: {name}") for name, default in FLAGS.items()}
        heads = values["num_heads"]
        kv_heads = typed(int | None, hf.get("num_kv_heads"), "config.json: num_kv_heads")
        inner = typed(int | None, hf.get("ffn_hidden_size"), "config.json: ffn_hidden_size")
        norms = typed(int | None, hf.get("num_ln_in_parallel_attn"), "config.json: num_ln_in_parallel_attn")
        new = on["new_decoder_architecture"]
        if norms not in (None, 1, 2) or (norms == 2 and not new):
            raise UserError(f"config.json: num_ln_in_parallel_attn={norms} is not supported here")
        found: dict[str, Any] = {
            "num_kv_heads": kv_heads if new else 1 if on["multi_query"] else heads,
            "intermediate_size": 4 * values["hidden_size"] if inner is None else inner,
            "attention_bias": on["bias"],
            "mlp_bias": on["bias"],
            "parallel": "two_norms" if new and norms != 1 else "one_norm" if new or on["parallel_attn"] else "no",
        }
        if not on["alibi"]:
            return found | read_rope(hf, values, self.THETA)
        head_dim = values["hidden_size"] // max(heads, 1)
        return found | {"positions": "alibi", "alibi_scale": max(head_dim, 1) ** -0.5}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        new = self._new(config)
        fields = {
            "num_kv_heads": config.num_kv_heads,
            "ffn_hidden_size": config.intermediate_size,
            "new_decoder_architecture": new,
            "multi_query": config.num_kv_heads == 1,
            "parallel_attn": config.parallel != "no",
            "num_ln_in_parallel_attn": (2 if config.parallel == "two_norms" else 1) if new else None,
            "alibi": config.positions == "alibi",
            "bias": config.attention_bias,
        }
        return fields | (write_rope(config) if config.positions == "rope" else {})

    def _new(self, config: ModelConfig) -> bool:
        """Only the new architecture has other numbers of key heads than one or all, and two norms."""
        return config.parallel == "two_norms" or config.num_kv_heads not in (1, config.num_heads)

    def fused_form(self, theirs: str, config: ModelConfig) -> Form:
        """Key head by key head: its queries, its key and its value."""
        assert config.num_kv_heads is not None
        return Form(transposed=True, groups=config.num_kv_heads)

    def layer_table(self, config: ModelConfig) -> Mapping[str, str]:
        two = config.parallel == "two_norms"
        return {
            "attention_norm": "ln_attn" if two else "input_layernorm",
            "mlp_norm": "ln_mlp" if two else "post_attention_layernorm",
            "attention/o": "self_attention.dense",
            "mlp/up": "mlp.dense_h_to_4h",
            "mlp/down": "mlp.dense_4h_to_h",
        }

    def canonical(self, name: str) -> str:
        return name if name.startswith(("transformer.", *OUTSIDE)) else f"transformer.{name}"


FAMILY = Falcon()
