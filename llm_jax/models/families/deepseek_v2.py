"""DeepSeek-V2 (arXiv:2405.04434): latent attention, dense layers first and then small experts beside shared ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_types
from llm_jax.models.config import ModelConfig
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families.experts import WithExperts
from llm_jax.models.families.llama import Llama
from llm_jax.models.families.olmoe import MLP, MLP_AT_ONCE
from llm_jax.models.latent_config import LatentConfig

LATENT = {
    "kv_rank": ("kv_lora_rank", 512),
    "q_rank": ("q_lora_rank", 1536),
    "nope_dim": ("qk_nope_head_dim", 128),
    "rope_dim": ("qk_rope_head_dim", 64),
    "value_dim": ("v_head_dim", 128),
}
"""Fields of `LatentConfig`: ours -> (theirs, what transformers takes where the field is absent)."""


class DeepseekV2(WithExperts, Llama):
    MODEL_TYPE = "deepseek_v2"
    ARCHITECTURE = "DeepseekV2ForCausalLM"
    FIELDS = {
        **{name: how for name, how in Llama.FIELDS.items() if name not in ("head_dim", "num_kv_heads")},
        "vocab_size": ("vocab_size", 102400),
    }
    CONSTANTS = {"rope_interleaved": True}
    FIXED = {
        "pretraining_tp": (1, None),
        "scoring_func": ("softmax", None),
        "moe_layer_freq": (1, None),
        # transformers takes no notice of it, DeepSeek's own code does.
        "norm_topk_prob": (False, None),
    }
    CARRIED = WithExperts.CARRIED | {"head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux"}
    ALIASES = {"num_experts": "n_routed_experts"}
    EXPERTS = {
        "num": ("n_routed_experts", 64),
        "top_k": ("num_experts_per_tok", None),
        "intermediate_size": ("moe_intermediate_size", 1407),
        "scale": ("routed_scaling_factor", 1.0),
    }
    EXPERTS_CONSTANTS = {"normalize": False}
    FIRST_DENSE: ClassVar[int] = 0
    """`first_k_dense_replace` where config.json has none."""
    SHARED: ClassVar[int] = 2
    """`n_shared_experts` where it has none."""
    LAYER = {
        **{ours: theirs for ours, theirs in Llama.LAYER.items() if not ours.startswith("attention/")},
        "latent/q": "self_attn.q_proj",
        "latent/q_down": "self_attn.q_a_proj",
        "latent/q_norm": "self_attn.q_a_layernorm",
        "latent/q_up": "self_attn.q_b_proj",
        "latent/kv_down": "self_attn.kv_a_proj_with_mqa",
        "latent/kv_norm": "self_attn.kv_a_layernorm",
        "latent/kv_up": "self_attn.kv_b_proj",
        "latent/o": "self_attn.o_proj",
        "mlp/router": "mlp.gate",
        "mlp/shared/gate": "mlp.shared_experts.gate_proj",
        "mlp/shared/up": "mlp.shared_experts.up_proj",
        "mlp/shared/down": "mlp.shared_experts.down_proj",
    }
    EACH = MLP
    ALL = MLP_AT_ONCE

    def derived_fields(self) -> set[str]:
        own = {"num_key_value_heads", "first_k_dense_replace", "n_shared_experts", "n_group", "topk_group"}
        return super().derived_fields() | own | {"topk_method"} | {theirs for theirs, _ in LATENT.values()}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        types = field_types(LatentConfig)
        latent = LatentConfig(
            **{
                name: typed(types[name], hf.get(theirs, default), f"config.json: {theirs}")
                for name, (theirs, default) in LATENT.items()
            }
        )
        heads, keys = values["num_heads"], hf.get("num_key_value_heads")
        if keys not in (None, heads):
            raise UserError(f"config.json: num_key_value_heads={keys!r} is not num_attention_heads={heads}")
        found = super().derived(hf, {**values, "head_dim": latent.rope_dim})
        if found["rope_dim"] is not None:
            raise UserError("config.json: partial_rotary_factor: it is qk_rope_head_dim that says how much turns")
        first = read_int(hf, "first_k_dense_replace", self.FIRST_DENSE)
        feeds = tuple("dense" if layer < first else "experts" for layer in range(values["num_layers"]))
        count = read_int(hf, "n_shared_experts", self.SHARED)
        if count < 1:
            raise UserError(f"config.json: n_shared_experts={count}, the {self.MODEL_TYPE} family has at least 1")
        experts = found["experts"]
        shared = {"shared_size": count * read_int(hf, *self.EXPERTS["intermediate_size"])}
        experts = dataclasses.replace(experts, **shared, **self.read_groups(hf))
        return found | {"head_dim": latent.rope_dim, "latent": latent, "feed_forwards": feeds, "experts": experts}

    def read_groups(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ExpertsConfig` about groups: there are none where experts are chosen among all."""
        method = hf.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise UserError(f"config.json: topk_method={method!r} is not one of greedy, group_limited_greedy")
        if method == "greedy":
            return {}
        return {"groups": read_int(hf, "n_group", None), "top_groups": read_int(hf, "topk_group", None)}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        latent, experts = config.latent, config.experts
        assert config.feed_forwards is not None
        own = {theirs: getattr(latent, name) for name, (theirs, _) in LATENT.items()}
        own |= {
            "num_key_value_heads": config.num_heads,
            "head_dim": latent.rope_dim,
            "qk_head_dim": latent.head_dim,
            "first_k_dense_replace": config.feed_forwards.index("experts") if experts.num else config.num_layers,
            "n_shared_experts": experts.shared_size // (experts.intermediate_size or 1),
        }
        return super().written(config) | own | self.write_groups(experts)

    def write_groups(self, experts: ExpertsConfig) -> dict[str, Any]:
        """The other way."""
        method = "greedy" if experts.groups == 1 else "group_limited_greedy"
        return {"topk_method": method, "n_group": experts.groups, "topk_group": experts.top_groups}


def read_int(hf: Mapping[str, Any], name: str, default: int | None) -> int:
    """Raises UserError where it is another type, or absent without a default."""
    return typed(int, hf.get(name, default), f"config.json: {name}")


FAMILY = DeepseekV2()
