"""Llama (Touvron et al. 2023, arXiv:2302.13971): config.json and weight names of `LlamaForCausalLM`, both ways."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_types
from llm_jax.models.config import ModelConfig

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

# Ours -> (theirs, what transformers takes where the field is absent).
FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "init_std": ("initializer_range", 0.02),
}

# Fields that change what the model computes, with the values under which it computes what the decoder does.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, None),
    "rope_scaling": (None,),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False, None),
}

# Read by other parts of transformers, or notes of where a model came from: carried along, without effect here.
# fmt: off
CARRIED = {
    "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "_name_or_path", "name_or_path", "id2label", "label2id", "num_labels",
    "problem_type", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "is_llama_config", "max_sequence_length", "_flash_attn_2_enabled", "_attn_implementation", "_from_model_config",
    "task_specific_params",
}
# fmt: on

PROJECTIONS = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The decoder's config. Raises UserError naming a field that the decoder does not honour."""
    return read_config(hf, MODEL_TYPE, ARCHITECTURE, FIELDS)


def read_config(
    hf: Mapping[str, Any], model_type: str, architecture: str, fields: Mapping[str, tuple[str, Any]]
) -> ModelConfig:
    """`from_hf` of a family that is a Llama but for its fields."""
    rope = typed(dict[str, Any] | None, hf.get("rope_parameters"), "config.json: rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.keys() - {
        "rope_type",
        "type",
        "rope_theta",
    }:
        raise UserError(f"config.json: rope_parameters={rope!r} is not supported (only rope_type 'default')")
    read = {theirs for theirs, _ in fields.values()} | {"rope_parameters", "rope_theta"}
    fixed = {**FIXED, "architectures": ([architecture], None)}
    for name, value in hf.items():
        if name in fixed and value not in fixed[name]:
            raise UserError(f"config.json: {name}={value!r} is not supported (only {fixed[name][0]!r})")
        if name not in read | fixed.keys() | CARRIED and value not in (None, False, {}, []):
            raise UserError(f"config.json: {name}={value!r} is not a field of the {model_type} family")
    kinds = field_types(ModelConfig)
    values = {
        name: typed(kinds[name], hf.get(theirs, default), f"config.json: {theirs}")
        for name, (theirs, default) in fields.items()
    }
    thetas = [
        typed(float, place["rope_theta"], "config.json: rope_theta") for place in (rope, hf) if "rope_theta" in place
    ]
    if len(set(thetas)) > 1:
        raise UserError(f"config.json: rope_parameters say rope_theta={thetas[0]}, and rope_theta is {thetas[1]}")
    config = ModelConfig(family=model_type, rope_theta=thetas[0] if thetas else 10000.0, **values)
    config.resolved()
    return config


def carried(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that the decoder does not read, for the next `to_hf`."""
    return {name: value for name, value in hf.items() if name in CARRIED or name in FIXED or name == "architectures"}


def to_hf(config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that transformers reads as the same model: release 5 (`rope_parameters`) and 4 (`rope_theta`)."""
    return write_config(config, extra, MODEL_TYPE, ARCHITECTURE, FIELDS)


def write_config(
    config: ModelConfig,
    extra: Mapping[str, Any],
    model_type: str,
    architecture: str,
    fields: Mapping[str, tuple[str, Any]],
) -> dict[str, Any]:
    """`to_hf` of a family that is a Llama but for its fields."""
    config = config.resolved()
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        **extra,
        **{theirs: getattr(config, name) for name, (theirs, _) in fields.items()},
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def weight_names(config: ModelConfig) -> list[tuple[str, int | None, str, bool]]:
    """`(path in our tree, layer, Hugging Face name, transposed)`; paths of layers are within the layer."""
    names: list[tuple[str, int | None, str, bool]] = [("embed/weight", None, "model.embed_tokens.weight", False)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        names += [(f"{ours}/weight", layer, f"{prefix}.{theirs}.weight", False) for ours, theirs in NORMS.items()]
        for ours, theirs in PROJECTIONS.items():
            names.append((f"{ours}/weight", layer, f"{prefix}.{theirs}.weight", True))
            if config.attention_bias if ours.startswith("attention") else config.mlp_bias:
                names.append((f"{ours}/bias", layer, f"{prefix}.{theirs}.bias", False))
    names.append(("norm/weight", None, "model.norm.weight", False))
    if not config.tie_embeddings:
        names.append(("head/weight", None, "lm_head.weight", True))
    return names


def is_derived(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of a folder holds nothing that the config and the other tensors do not say."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Multiplications and additions of one token's forward pass in a causal sequence of `length` tokens.

    Two per weight of every matrix product (the lookup of the embedding is none), and 4 * N * H per layer and key for
    attention's two products, over the (length + 1) / 2 keys a query sees on average, or fewer where there is a window.
    A training step takes three times that, without recomputation.
    """
    config = config.resolved()
    assert config.vocab_size and config.head_dim and config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    weights = config.num_layers * (attention + mlp) + config.hidden_size * config.vocab_size
    seen = min(length, config.window or length)
    keys = (seen * (seen + 1) / 2 + (length - seen) * seen) / length
    return 2.0 * weights + 4.0 * config.num_layers * config.num_heads * config.head_dim * keys
