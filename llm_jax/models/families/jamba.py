"""Jamba (Lieber et al. 2024, arXiv:2403.19887): Mamba with norms inside, some attention, some experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import FeedForwardKind, Mixer, ModelConfig
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families.experts import WithExperts
from llm_jax.models.families.llama import Llama
from llm_jax.models.families.states import WithMamba, mamba_fused, mamba_names

ATTENTION, EXPERTS = ("attn_layer", 8, 4), ("expert_layer", 2, 1)
"""Fields `NAME_period` and `NAME_offset`, and what they are where config.json has none."""


class Jamba(WithMamba, WithExperts, Llama):
    MODEL_TYPE = "jamba"
    ARCHITECTURE = "JambaForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if not name.endswith("_bias")},
        "vocab_size": ("vocab_size", 65536),
        "intermediate_size": ("intermediate_size", 14336),
        "num_kv_heads": ("num_key_value_heads", 8),
        "max_position_embeddings": ("max_position_embeddings", 262144),
    }
    CONSTANTS = {"positions": "none"}
    FIXED = {"mamba_inner_layernorms": (True, None), "sliding_window": (None,)}
    CARRIED = WithExperts.CARRIED | {
        "use_mamba_kernels",
        "use_mambapy",
        "use_associative_scan",
        "num_logits_to_keep",
        "calc_logits_for_entire_prompt",
        "attn_implementation",
        "n_ctx",
    }
    ALIASES = {"num_local_experts": "num_experts"}
    MAMBA = {
        "state_size": ("mamba_d_state", 16),
        "conv_width": ("mamba_d_conv", 4),
        "conv_bias": ("mamba_conv_bias", True),
        "bias": ("mamba_proj_bias", False),
    }
    EXPERTS = {"num": ("num_experts", 16), "top_k": ("num_experts_per_tok", 2)}
    EXPERTS_CONSTANTS = {"normalize": False}
    TOP = {**Llama.TOP, "norm": "model.final_layernorm"}
    LAYER = {
        **Llama.LAYER,
        **mamba_names("mamba"),
        "mamba/dt_norm": "mamba.dt_layernorm",
        "mamba/b_norm": "mamba.b_layernorm",
        "mamba/c_norm": "mamba.c_layernorm",
        "mlp_norm": "pre_ff_layernorm",
        "mlp/gate": "feed_forward.gate_proj",
        "mlp/up": "feed_forward.up_proj",
        "mlp/down": "feed_forward.down_proj",
        "mlp/router": "feed_forward.router",
    }
    FUSED = mamba_fused("mamba")
    EACH = {f"mlp/{name}": f"feed_forward.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")}
    ALL = {
        "feed_forward.experts.gate_up_proj": ("mlp/gate", "mlp/up"),
        "feed_forward.experts.down_proj": ("mlp/down",),
    }

    def derived_fields(self) -> set[str]:
        turns = {f"{name}_{which}" for name, _, _ in (ATTENTION, EXPERTS) for which in ("period", "offset")}
        return super().derived_fields() | turns

    def mixers(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Mixer, ...]:
        turns = _read_turns(hf, *ATTENTION, values["num_layers"])
        return tuple("attention" if turn else "mamba" for turn in turns)

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        own = {"selection_norm": "weighted", "norm_eps": values["norm_eps"]}
        return super().mamba_from_hf(hf, values) | own

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        found, turns = super().derived(hf, values), _read_turns(hf, *EXPERTS, values["num_layers"])
        # A single expert is a dense layer.
        many = found["experts"].num > 1
        kinds: list[FeedForwardKind] = ["experts" if many and turn else "dense" for turn in turns]
        if "experts" not in kinds:
            found["experts"] = ExpertsConfig()
        return found | {"feed_forwards": tuple(kinds)}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.mixers is not None and config.feed_forwards is not None
        fields = super().written(config) | _write_turns(ATTENTION[0], [mixer == "attention" for mixer in config.mixers])
        if "experts" not in config.feed_forwards:
            return fields | {"num_experts": 1}
        return fields | _write_turns(EXPERTS[0], [kind == "experts" for kind in config.feed_forwards])


def _read_turns(hf: Mapping[str, Any], name: str, period: int, offset: int, layers: int) -> list[bool]:
    """Which layers are of a kind: those whose number divided by the period leaves the offset."""
    period = typed(int, hf.get(f"{name}_period", period), f"config.json: {name}_period")
    offset = typed(int, hf.get(f"{name}_offset", offset), f"config.json: {name}_offset")
    if not 0 <= offset < period:
        raise UserError(f"config.json: {name}_offset={offset} has to be at least 0 and below {name}_period={period}")
    return [layer % period == offset for layer in range(layers)]


def _write_turns(name: str, turns: Sequence[bool]) -> dict[str, Any]:
    """Fields that `_read_turns` reads as `turns`, if there are any."""
    layers, of_kind = len(turns), [layer for layer, turn in enumerate(turns) if turn]
    first = [*of_kind, layers][0]
    second = [*of_kind[1:], first + layers + 1][0]
    return {f"{name}_period": second - first, f"{name}_offset": first}


FAMILY = Jamba()
