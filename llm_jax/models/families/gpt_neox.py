"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373)."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import Family
from llm_jax.models.families.tensors import Form


class GptNeoX(Family):
    MODEL_TYPE = "gpt_neox"
    ARCHITECTURE = "GPTNeoXForCausalLM"
    FIELDS = {
        "vocab_size": ("vocab_size", 50432),
        "hidden_size": ("hidden_size", 6144),
        "intermediate_size": ("intermediate_size", 24576),
        "num_layers": ("num_hidden_layers", 44),
        "num_heads": ("num_attention_heads", 64),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
        "attention_bias": ("attention_bias", True),
        "activation": ("hidden_act", "gelu"),
        "init_std": ("initializer_range", 0.02),
    }
    CONSTANTS = {"norm": "layer", "mlp_bias": True, "gated": False}
    CARRIED = {"hidden_dropout", "classifier_dropout"}
    ALIASES = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    PARTIAL = 0.25
    TOP = {
        "embed": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
    SCORE = {"sequence": "score", "token": "classifier"}
    RUNNING = {"embed_out.": "lm_head."}
    PREFIX = "gpt_neox.layers."
    LAYER = {
        "attention_norm": "input_layernorm",
        "attention/o": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp/up": "mlp.dense_h_to_4h",
        "mlp/down": "mlp.dense_4h_to_h",
    }
    FUSED = {"attention.query_key_value": ("attention/q", "attention/k", "attention/v")}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"use_parallel_residual"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        parallel = typed(bool, hf.get("use_parallel_residual", True), "config.json: use_parallel_residual")
        return super().derived(hf, values) | {"parallel": "two_norms" if parallel else "no"}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        fields = super().written(config)
        old = {"rotary_pct": fields["rope_parameters"].get("partial_rotary_factor", 1.0)}
        old["rotary_emb_base"] = config.rope_theta
        return fields | old | {"use_parallel_residual": config.parallel != "no"}

    def fused_form(self, theirs: str, config: ModelConfig) -> Form:
        """Head by head: its query, key and value."""
        return Form(transposed=True, groups=config.num_heads)

    def canonical(self, name: str) -> str:
        return "embed_out.weight" if name == "lm_head.weight" else name

    def is_derived(self, name: str, config: ModelConfig) -> bool:
        return name.endswith((".attention.bias", ".attention.masked_bias")) or super().is_derived(name, config)


FAMILY = GptNeoX()
