"""Phi-3 and 3.5 (Abdin et al. 2024, arXiv:2404.14219): fused projections, LongRoPE, partial rotation (Phi-4-mini)."""

from collections.abc import Mapping
from typing import Any

from llm_jax.models.config import ModelConfig
from llm_jax.models.families.llama import Llama
from llm_jax.models.families.rope import write_rope


class Phi3(Llama):
    MODEL_TYPE = "phi3"
    ARCHITECTURE = "Phi3ForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if not name.endswith("_bias")},
        "vocab_size": ("vocab_size", 32064),
        "hidden_size": ("hidden_size", 3072),
        "intermediate_size": ("intermediate_size", 8192),
        "max_position_embeddings": ("max_position_embeddings", 4096),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "window": ("sliding_window", None),
    }
    CARRIED = {"embd_pdrop", "resid_pdrop", "original_max_position_embeddings", "attention_bias"}
    TOKENS = {"eos_token_id": 32000, "pad_token_id": 32000}
    FUSED = {
        "self_attn.qkv_proj": ("attention/q", "attention/k", "attention/v"),
        "mlp.gate_up_proj": ("mlp/gate", "mlp/up"),
    }

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        # Its first folders call LongRoPE by other names.
        names = {"su": "longrope", "yarn": "longrope"}
        parameters = {}
        for place in ("rope_parameters", "rope_scaling"):
            rope = hf.get(place)
            if isinstance(rope, Mapping):
                parameters[place] = {key: names.get(value, value) if key in ("type", "rope_type") else value
                                     for key, value in rope.items()}  # fmt: skip
        return super().derived({**hf, **parameters}, values)

    def written(self, config: ModelConfig) -> dict[str, Any]:
        fields = write_rope(config)
        if config.rope_scaling is not None:
            fields["original_max_position_embeddings"] = config.rope_scaling.original_length
        return fields


FAMILY = Phi3()
