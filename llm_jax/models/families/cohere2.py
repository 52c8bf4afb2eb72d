"""Command R7B and Command A (Cohere 2024, "cohere2"): attention and feed-forward side by side after one LayerNorm
without bias, three sliding layers that turn to a full one that does not, scaled logits."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import every, read_sights, write_sights
from llm_jax.models.families.llama import Llama


class Cohere2(Llama):
    MODEL_TYPE = "cohere2"
    ARCHITECTURE = "Cohere2ForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name != "mlp_bias"},
        "vocab_size": ("vocab_size", 256000),
        "hidden_size": ("hidden_size", 8192),
        "intermediate_size": ("intermediate_size", 22528),
        "num_layers": ("num_hidden_layers", 40),
        "num_heads": ("num_attention_heads", 64),
        "max_position_embeddings": ("max_position_embeddings", 8192),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "logit_scale": ("logit_scale", 0.0625),
        "window": ("sliding_window", 4096),
    }
    CONSTANTS = {"norm": "layer_unbiased", "parallel": "one_norm", "rope_interleaved": True}
    FIXED = {"use_qk_norm": (False, None), "use_parallel_block": (True,), "use_gated_activation": (True,),
             "use_embedding_sharing": (True,), "position_embedding_type": ("rope_gptj",), "rotary_pct": (1,),
             "layer_switch": (4, None), "order_of_interleaved_layers": ("local_attn_first",)}  # fmt: skip
    ALIASES = {"_sliding_window_pattern": "sliding_window_pattern"}
    TOKENS = {"eos_token_id": 255001}
    LAYER = {name: theirs for name, theirs in Llama.LAYER.items() if name != "mlp_norm"}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"sliding_window_pattern", "layer_types"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        pattern = typed(int, hf.get("sliding_window_pattern", 4), "config.json: sliding_window_pattern")
        sights = read_sights(hf, every(max(pattern, 1), "full", "sliding", values["num_layers"]))
        turned = tuple(sees == "sliding" for sees in sights)
        return super().derived(hf, values) | {"sights": sights, "rope_layers": turned}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        return super().written(config) | write_sights(config)


FAMILY = Cohere2()
