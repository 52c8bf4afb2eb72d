"""Nemotron-H (NVIDIA 2025, arXiv:2504.03624): a Mamba-2, an attention, a feed-forward or experts alone in a layer."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import FeedForwardKind, Mixer, ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families.experts import WithExperts
from llm_jax.models.families.further import WithFurther
from llm_jax.models.families.states import WithMamba2, mamba2_fused, mamba2_names
from llm_jax.models.families.tensors import Tensor

KINDS: dict[str, tuple[str, Mixer, FeedForwardKind]] = {
    "linear_attention": ("M", "mamba2", "none"),
    "full_attention": ("*", "attention", "none"),
    "mlp": ("-", "none", "dense"),
    "moe": ("E", "none", "experts"),
}
"""Entry of `layers_block_type` -> letter of `hybrid_override_pattern`, and what such a layer is of ours."""
LETTERS: dict[tuple[str | None, str | None], str] = {(mixer, feed): letter for letter, mixer, feed in KINDS.values()}
OLDER = {"mamba": "linear_attention", "attention": "full_attention"}
SPELLINGS = ("layers_block_type", "hybrid_override_pattern")
FURTHER_SPELLINGS = ("mtp_layers_block_type", "mtp_hybrid_override_pattern")
"""Fields that list layers, by name and by letter; and those that list the parts of a layer for a further token."""
FURTHER = ["full_attention", "moe"]
"""Such a layer where nothing is said of it."""


class NemotronH(WithFurther, WithMamba2, WithExperts):
    MODEL_TYPE = "nemotron_h"
    ARCHITECTURE = "NemotronHForCausalLM"
    FIELDS = {
        "vocab_size": ("vocab_size", 131072),
        "hidden_size": ("hidden_size", 4096),
        "intermediate_size": ("intermediate_size", 21504),
        "num_heads": ("num_attention_heads", 32),
        "num_kv_heads": ("num_key_value_heads", 8),
        "head_dim": ("head_dim", 128),
        "max_position_embeddings": ("max_position_embeddings", 4096),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "mlp_bias": ("mlp_bias", False),
        "activation": ("mlp_hidden_act", "relu2"),
        "init_std": ("initializer_range", 0.02),
        "mtp": ("num_nextn_predict_layers", 0),
    }
    CONSTANTS = {"positions": "none", "gated": False}
    FIXED = {"hidden_dropout": (0, None)}
    # Among them what other families read: here the head is never tied, attention has neither biases nor a window nor
    # positions, steps have one limit, and heads say how wide the scan is.
    CARRIED = WithExperts.CARRIED | {
        "tie_word_embeddings",
        "attention_bias",
        "sliding_window",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "time_step_limit",
        "time_step_max",
        "time_step_floor",
        "time_step_rank",
        "expand",
        "mamba_proj_bias",
        "chunk_size",
        "mamba_ssm_cache_dtype",
        "n_shared_experts",
        "moe_shared_expert_overlap",
        "num_logits_to_keep",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "use_mamba_kernels",
    }
    ALIASES = {
        "layer_types": "layers_block_type",
        "attention_head_dim": "head_dim",
        "rms_norm_eps": "layer_norm_epsilon",
        "norm_eps": "layer_norm_epsilon",
        "num_local_experts": "n_routed_experts",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_expand": "expand",
        "mamba_dt_min": "time_step_min",
        "mamba_dt_max": "time_step_max",
        "mamba_dt_limit": "time_step_limit",
        "mamba_dt_init_floor": "time_step_floor",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_chunk_size": "chunk_size",
    }
    MAMBA = {
        "state_size": ("ssm_state_size", 128),
        "conv_width": ("conv_kernel", 4),
        "conv_bias": ("use_conv_bias", True),
        "bias": ("use_bias", False),
        "num_heads": ("mamba_num_heads", 128),
        "num_groups": ("n_groups", 8),
        "dt_min": ("time_step_min", 1e-3),
    }
    MAMBA_ACTIVATION = "mamba_hidden_act"
    EXPAND = None
    HEAD_DIM = ("mamba_head_dim", 64)
    EXPERTS = {
        "num": ("n_routed_experts", 8),
        "top_k": ("num_experts_per_tok", 2),
        "intermediate_size": ("moe_intermediate_size", 7688),
        "latent_size": ("moe_latent_size", None),
        "normalize": ("norm_topk_prob", True),
        "scale": ("routed_scaling_factor", 1.0),
        "groups": ("n_group", 1),
        "top_groups": ("topk_group", 1),
        "shared_size": ("moe_shared_expert_intermediate_size", 7688),
    }
    EXPERTS_CONSTANTS = {"scores": "sigmoid", "correction_bias": True, "group_score": "top2"}
    TOP = {"embed": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"}
    RUNNING = {"backbone.": "model."}
    PREFIX = "backbone.layers."
    LAYER = {
        **mamba2_names("mixer"),
        "attention_norm": "norm",
        "attention/q": "mixer.q_proj",
        "attention/k": "mixer.k_proj",
        "attention/v": "mixer.v_proj",
        "attention/o": "mixer.o_proj",
        "mlp_norm": "norm",
        "mlp/up": "mixer.up_proj",
        "mlp/down": "mixer.down_proj",
        "mlp/router": "mixer.gate",
        "mlp/router/correction": "mixer.gate.e_score_correction_bias",
        "mlp/latent_in": "mixer.fc1_latent_proj",
        "mlp/latent_out": "mixer.fc2_latent_proj",
        "mlp/shared/up": "mixer.shared_experts.up_proj",
        "mlp/shared/down": "mixer.shared_experts.down_proj",
    }
    FUSED = mamba2_fused("mixer")
    EACH = {f"mlp/{name}": f"mixer.experts.{{}}.{name}_proj" for name in ("up", "down")}
    ALL = {f"mixer.experts.{name}_proj": (f"mlp/{name}",) for name in ("up", "down")}

    FURTHER = {**WithFurther.FURTHER, "norm": "final_layernorm"}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {*SPELLINGS, *FURTHER_SPELLINGS, "num_hidden_layers"}

    def mixers(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Mixer, ...]:
        return tuple(KINDS[name][1] for name in _layers(hf))

    def inner_size(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> int:
        sizes = (self.MAMBA["num_heads"], self.HEAD_DIM)
        heads, width = (typed(int, hf.get(*field), f"config.json: {field[0]}") for field in sizes)
        return heads * width

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        return {"inner_size": self.inner_size(hf, values), "norm_eps": values["norm_eps"]}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        kinds = tuple(KINDS[name][2] for name in _layers(hf))
        found = super().derived(hf, values) | {"num_layers": len(kinds), "feed_forwards": kinds}
        if values["mtp"] > 1:
            raise UserError(
                f"config.json: num_nextn_predict_layers={values['mtp']}: the nemotron_h family has one layer for a "
                "further token at most, as the engines have it that run such layers"
            )
        if values["mtp"]:
            found["mtp_mixer"], found["mtp_feed_forward"] = _further_kinds(hf)
        return found if "experts" in kinds else found | {"experts": ExpertsConfig()}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.mixers is not None and config.feed_forwards is not None
        fields = super().written(config)
        if "experts" not in config.feed_forwards:
            for theirs, _ in self.EXPERTS.values():
                del fields[theirs]
        if self.MIXER in config.mixers:
            del fields["time_step_limit"]
        for layer, kind in enumerate(zip(config.mixers, config.feed_forwards)):
            if kind not in LETTERS:
                raise UserError(
                    f"model.mixers and model.feed_forwards: layer {layer} is {kind[0]} and {kind[1]}, one of them has "
                    "to be none in the nemotron_h family"
                )
        # The one spelling that every release reads.
        pattern = "".join(LETTERS[kind] for kind in zip(config.mixers, config.feed_forwards))
        if config.mtp:
            parts = ((config.mtp_mixer, "none"), ("none", config.mtp_feed_forward))
            fields["mtp_hybrid_override_pattern"] = "".join(LETTERS.get(part, "") for part in parts)
        return fields | {"hybrid_override_pattern": pattern, "num_hidden_layers": config.num_layers}

    def further_prefix(self, config: ModelConfig, depth: int, path: str) -> str:
        """A mixer and a feed-forward have a layer each here; what comes before them is in the first, the norm behind
        them in the last."""
        del depth
        both = "none" not in (config.mtp_mixer, config.mtp_feed_forward)
        return f"mtp.layers.{int(both and path.startswith(('mlp', 'norm/')))}."

    def tensors(self, decoder: Decoder, present: frozenset[str] = frozenset()) -> list[Tensor]:
        """With those of further tokens' layers, which transformers leaves aside, and other engines run."""
        return super().tensors(decoder, present) + self.further_tensors(decoder)

    def canonical(self, name: str) -> str:
        return f"backbone.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _spelled(hf: Mapping[str, Any], fields: tuple[str, str]) -> tuple[list[str], list[str]]:
    """What the two fields list, as entries of `KINDS`."""
    types: tuple[str, ...] = typed(tuple[str, ...] | None, hf.get(fields[0]), f"config.json: {fields[0]}") or ()
    pattern = typed(str | None, hf.get(fields[1]), f"config.json: {fields[1]}")
    by_name = [OLDER.get(name, name) for name in types]
    for name in by_name:
        if name not in KINDS:
            raise UserError(f"config.json: {fields[0]} has {name!r}, not one of {', '.join(KINDS)}")
    spelled = {letter: name for name, (letter, _, _) in KINDS.items()}
    for letter in pattern or ():
        if letter not in spelled:
            raise UserError(f"config.json: {fields[1]} has {letter!r}, not one of {' '.join(spelled)}")
    by_letter = [spelled[letter] for letter in pattern or ()]
    return by_name, by_letter


def _layers(hf: Mapping[str, Any]) -> list[str]:
    """An entry of `KINDS` for each layer."""
    by_name, by_letter = _spelled(hf, SPELLINGS)
    if by_name and by_letter and by_name != by_letter:
        raise UserError("config.json: layers_block_type and hybrid_override_pattern say different things")
    found = by_name or by_letter or ["linear_attention", "moe", "full_attention", "mlp"]
    if hf.get("num_hidden_layers", len(found)) != len(found):
        raise UserError(f"config.json: num_hidden_layers={hf['num_hidden_layers']!r}, but {len(found)} are described")
    return found


def _further_kinds(hf: Mapping[str, Any]) -> tuple[Mixer, FeedForwardKind]:
    """Mixer and feed-forward of a layer for a further token."""
    by_name, by_letter = _spelled(hf, FURTHER_SPELLINGS)
    # transformers writes the default by name beside another pattern by letter, and takes the pattern.
    if by_letter and by_name not in ([], by_letter, FURTHER):
        raise UserError(f"config.json: {' and '.join(FURTHER_SPELLINGS)} say different things")
    found = by_letter or by_name or FURTHER
    mixers: list[Mixer] = [KINDS[name][1] for name in found if KINDS[name][1] != "none"]
    feeds: list[FeedForwardKind] = [KINDS[name][2] for name in found if KINDS[name][2] != "none"]
    if len(mixers) > 1 or len(feeds) > 1 or (mixers and KINDS[found[0]][1] == "none"):
        raise UserError(
            f"config.json: a layer for a further token (mtp_hybrid_override_pattern) is {', '.join(found)}; read are a "
            "mixer, a feed-forward, or the second behind the first"
        )
    return mixers[0] if mixers else "none", feeds[0] if feeds else "none"


FAMILY = NemotronH()
