"""Qwen 3 with experts (Yang et al. 2025, arXiv:2505.09388), in all layers or in some."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.experts import WithExperts
from llm_jax.models.families.llama import Llama
from llm_jax.models.families.olmoe import MLP, MLP_AT_ONCE
from llm_jax.models.families.qwen3 import Qwen3


class Qwen3Moe(WithExperts, Llama):
    MODEL_TYPE = "qwen3_moe"
    ARCHITECTURE = "Qwen3MoeForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name != "mlp_bias"},
        "vocab_size": ("vocab_size", 151936),
        "hidden_size": ("hidden_size", 2048),
        "intermediate_size": ("intermediate_size", 6144),
        "num_layers": ("num_hidden_layers", 24),
        "num_kv_heads": ("num_key_value_heads", 4),
        "max_position_embeddings": ("max_position_embeddings", 32768),
    }
    CONSTANTS = Qwen3.CONSTANTS
    # Its windows are in all layers or in none, whatever this says.
    CARRIED = WithExperts.CARRIED | {"max_window_layers"}
    ALIASES = {"num_experts": "num_local_experts"}
    EXPERTS = {
        "num": ("num_local_experts", 128),
        "top_k": ("num_experts_per_tok", 8),
        "intermediate_size": ("moe_intermediate_size", 768),
        "normalize": ("norm_topk_prob", False),
    }
    LAYER = {**Qwen3.LAYER, "mlp/router": "mlp.gate"}
    EACH = MLP
    ALL = MLP_AT_ONCE

    def derived_fields(self) -> set[str]:
        own = {"use_sliding_window", "sliding_window", "decoder_sparse_step", "mlp_only_layers"}
        return super().derived_fields() | own

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        on = typed(bool, hf.get("use_sliding_window", False), "config.json: use_sliding_window")
        window = typed(int | None, hf.get("sliding_window", 4096) if on else None, "config.json: sliding_window")
        step = typed(int, hf.get("decoder_sparse_step", 1), "config.json: decoder_sparse_step")
        dense = typed(tuple[int, ...] | None, hf.get("mlp_only_layers"), "config.json: mlp_only_layers") or ()
        kinds = tuple(
            "dense" if layer in dense or (layer + 1) % step else "experts" for layer in range(values["num_layers"])
        )
        return super().derived(hf, values) | {"window": window, "feed_forwards": kinds}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.feed_forwards is not None
        own = {
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, kind in enumerate(config.feed_forwards) if kind == "dense"],
        }
        return super().written(config) | own


FAMILY = Qwen3Moe()
