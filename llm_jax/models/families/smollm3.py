"""SmolLM3 (Hugging Face 2025): a Llama whose every fourth layer does not turn its queries and keys."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import read_sights, write_sights
from llm_jax.models.families.llama import Llama


class SmolLM3(Llama):
    MODEL_TYPE = "smollm3"
    ARCHITECTURE = "SmolLM3ForCausalLM"
    FIELDS = {
        **Llama.FIELDS,
        "vocab_size": ("vocab_size", 128256),
        "hidden_size": ("hidden_size", 2048),
        "num_layers": ("num_hidden_layers", 36),
        "num_heads": ("num_attention_heads", 16),
        "num_kv_heads": ("num_key_value_heads", 4),
        "max_position_embeddings": ("max_position_embeddings", 32768),
        "tie_embeddings": ("tie_word_embeddings", True),
    }
    CARRIED = {"max_window_layers"}
    THETA = 2e6
    TOKENS = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004}

    def derived_fields(self) -> set[str]:
        own = {"no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types"}
        return super().derived_fields() | own

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        layers = range(values["num_layers"])
        interval = typed(int, hf.get("no_rope_layer_interval", 4), "config.json: no_rope_layer_interval")
        # Despite its name 1 means that the layer turns them.
        said = typed(tuple[int, ...] | None, hf.get("no_rope_layers"), "config.json: no_rope_layers")
        turned = [(layer + 1) % max(interval, 1) != 0 for layer in layers] if said is None else [x != 0 for x in said]
        on = typed(bool, hf.get("use_sliding_window", False), "config.json: use_sliding_window")
        window = typed(int | None, hf.get("sliding_window") if on else None, "config.json: sliding_window")
        default = ["sliding" if window is not None and not turns else "full" for turns in turned]
        own = {"window": window, "sights": read_sights(hf, default), "rope_layers": tuple(turned)}
        return super().derived(hf, values) | own

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.rope_layers is not None
        own = {
            "no_rope_layers": [int(turned) for turned in config.rope_layers],
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
        }
        return super().written(config) | own | write_sights(config)


FAMILY = SmolLM3()
