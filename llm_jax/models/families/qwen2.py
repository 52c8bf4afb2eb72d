"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): biases on q, k, v; windows from some layer on."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import read_sights, write_sights
from llm_jax.models.families.llama import Llama


class Qwen2(Llama):
    MODEL_TYPE = "qwen2"
    ARCHITECTURE = "Qwen2ForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if not name.endswith("_bias")},
        "vocab_size": ("vocab_size", 151936),
        "intermediate_size": ("intermediate_size", 22016),
        "num_kv_heads": ("num_key_value_heads", 32),
        "max_position_embeddings": ("max_position_embeddings", 32768),
    }
    CONSTANTS = {"attention_bias": True, "output_bias": False}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        on = typed(bool, hf.get("use_sliding_window", False), "config.json: use_sliding_window")
        window = typed(int | None, hf.get("sliding_window") if on else None, "config.json: sliding_window")
        full = typed(int, hf.get("max_window_layers", 28), "config.json: max_window_layers")
        layers = range(values["num_layers"])
        default = ["full" if window is None or layer < full else "sliding" for layer in layers]
        return super().derived(hf, values) | {"window": window, "sights": read_sights(hf, default)}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.sights is not None
        sliding = config.sights.index("sliding") if "sliding" in config.sights else config.num_layers
        own = {
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
            "max_window_layers": sliding,
        }
        return super().written(config) | own | write_sights(config)


FAMILY = Qwen2()
