"""Llama 4, its text decoder (Meta 2025): layers that see chunks and turn, and every fourth one that sees all and does
not, experts chosen one at a time whose weight multiplies what goes in."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import read_sights, write_sights
from llm_jax.models.families.fused_experts import WithFusedExperts
from llm_jax.models.families.llama import Llama


class Llama4Text(WithFusedExperts, Llama):
    MODEL_TYPE = "llama4_text"
    ARCHITECTURE = "Llama4ForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name != "mlp_bias"},
        "vocab_size": ("vocab_size", 202048),
        "hidden_size": ("hidden_size", 5120),
        "intermediate_size": ("intermediate_size_mlp", 16384),
        "num_layers": ("num_hidden_layers", 48),
        "num_heads": ("num_attention_heads", 40),
        "num_kv_heads": ("num_key_value_heads", 8),
        "head_dim": ("head_dim", 128),
        "max_position_embeddings": ("max_position_embeddings", 4096 * 32),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "chunk": ("attention_chunk_size", 8192),
    }
    CONSTANTS = {"rope_interleaved": True}
    # The last two say nothing where queries don't grow; they are written where they do.
    CARRIED = WithFusedExperts.CARRIED | {"for_llm_compressor", "attn_scale", "floor_scale"}
    THETA = 500000.0
    EXPERTS = {
        "num": ("num_local_experts", 16),
        "top_k": ("num_experts_per_tok", 1),
        "intermediate_size": ("intermediate_size", 8192),
    }
    EXPERTS_CONSTANTS = {"scores": "sigmoid", "normalize": False, "weigh": "input"}
    LAYER = {
        **{ours: theirs.replace("mlp.", "feed_forward.") for ours, theirs in Llama.LAYER.items()},
        "mlp/router": "feed_forward.router",
        "mlp/shared/gate": "feed_forward.shared_expert.gate_proj",
        "mlp/shared/up": "feed_forward.shared_expert.up_proj",
        "mlp/shared/down": "feed_forward.shared_expert.down_proj",
    }
    ALL = {
        "feed_forward.experts.gate_up_proj": ("mlp/gate", "mlp/up"),
        "feed_forward.experts.down_proj": ("mlp/down",),
    }
    IN_TURN = False
    EXPERTS_TURNED = True

    def derived_fields(self) -> set[str]:
        layers = {"moe_layers", "interleave_moe_layer_step", "no_rope_layers", "no_rope_layer_interval", "layer_types"}
        return super().derived_fields() | layers | {"use_qk_norm", "attn_temperature_tuning"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        def read(name: str, kind: Any, default: Any) -> Any:
            return typed(kind, hf.get(name, default), f"config.json: {name}")

        def read_period(name: str, default: int) -> int:
            if (value := read(name, int, default)) < 1:
                raise UserError(f"config.json: {name}={value} is not a positive number")
            return value

        layers, interval = range(values["num_layers"]), read_period("no_rope_layer_interval", 4)
        # Despite its name 1 means that the layer turns them.
        said = read("no_rope_layers", tuple[int, ...] | None, None)
        turned = tuple(x != 0 for x in said) if said else tuple((layer + 1) % interval != 0 for layer in layers)
        step = read_period("interleave_moe_layer_step", 1)
        chosen = read("moe_layers", tuple[int, ...] | None, None)
        chosen = layers[step - 1 :: step] if chosen is None else chosen
        own: dict[str, Any] = {
            "rope_layers": turned,
            "sights": read_sights(hf, ["chunked" if turns else "full" for turns in turned]),
            "feed_forwards": tuple("experts" if layer in chosen else "dense" for layer in layers),
            "qk_norm": "plain" if read("use_qk_norm", bool, True) else "none",
        }
        if read("attn_temperature_tuning", bool, True):
            own["query_growth"] = read("attn_scale", float, 0.1)
            own["query_growth_every"] = read("floor_scale", int, 8192)
        found = super().derived(hf, values) | own
        experts = found["experts"]
        return found | {"experts": dataclasses.replace(experts, shared_size=experts.intermediate_size)}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.rope_layers is not None and config.feed_forwards is not None
        own: dict[str, Any] = {
            "no_rope_layers": [int(turns) for turns in config.rope_layers],
            "moe_layers": [layer for layer, kind in enumerate(config.feed_forwards) if kind == "experts"],
            "use_qk_norm": config.qk_norm == "plain",
            "attn_temperature_tuning": config.query_growth is not None,
        }
        if config.query_growth is not None:
            own |= {"attn_scale": config.query_growth, "floor_scale": config.query_growth_every}
        return super().written(config) | own | write_sights(config)


FAMILY = Llama4Text()
