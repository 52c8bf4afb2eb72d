"""Floating-point operations of a model, by the usual convention."""

import math

from llm_jax.base.trees import flatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.models.segments import LayerSpec, further_spec


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Multiplications and additions of one token's forward pass in a sequence of `length` tokens.

    The layers for further tokens (`mtp`) take no part.

    Two per weight of every matrix product (the lookup of an embedding is none), of experts those that a token is sent
    to; and 4 * N * H per layer and key for attention's two products, over the keys that a query sees on average. A
    state-space layer takes 6 * I * N for its states (they fade, take in, are read) and 2 * K for each channel of its
    convolution.
    """
    return _forward(Decoder(config.without_further()), length)


def training_flops_per_token(config: ModelConfig, length: int, further: bool) -> float:
    """Of a training step: three times the forward pass, without recomputation. `further`: whether it trains the layers
    for further tokens, each a layer, a projection, and the head once more."""
    forward = flops_per_token(config, length)
    if further:
        decoder = Decoder(config)
        config, layer = decoder.config, further_spec(decoder.config)
        head = 2.0 * config.hidden_size * (config.vocab_size or 0)
        mixed = _attention(config, layer, length) + _states(config, layer)
        forward = _forward(decoder, length) + config.mtp * (mixed + head)
    return 3 * forward


def _forward(decoder: Decoder, length: int) -> float:
    config = decoder.config
    assert config.head_dim is not None and config.vocab_size is not None
    flat, declared = flatten(abstract_params(decoder)), flatten(declarations(decoder))
    active = config.experts.top_k / max(config.experts.num, 1)
    weights = sum(
        math.prod(leaf.shape) * (active if "experts" in declared[path].axes else 1)
        for path, leaf in flat.items()
        if declared[path].matrix is not None and not path.endswith("embed/weight")
    )
    if config.tie_embeddings and config.head.labels is None:
        weights += config.hidden_size * config.vocab_size
    mixed = sum(
        (_attention(config, spec, length) + _states(config, spec)) * segment.repeats
        for segment in decoder.groups
        for spec in segment.block
    )
    return 2.0 * weights + mixed


def _states(config: ModelConfig, spec: LayerSpec) -> float:
    mamba = config.mamba
    if spec.mixer not in ("mamba", "mamba2"):
        return 0.0
    shared = 2 * mamba.num_groups * mamba.state_size if spec.mixer == "mamba2" else 0
    return 6.0 * mamba.inner_size * mamba.state_size + 2.0 * mamba.conv_width * (mamba.inner_size + shared)


def _attention(config: ModelConfig, spec: LayerSpec, length: int) -> float:
    assert config.head_dim is not None
    if spec.mixer == "latent":
        sizes = config.latent.head_dim + config.latent.value_dim
    elif spec.mixer == "attention":
        sizes = 2 * config.head_dim
    else:
        return 0.0
    return 2.0 * config.num_heads * sizes * _keys(config, spec, length)


def _keys(config: ModelConfig, spec: LayerSpec, length: int) -> float:
    """Keys that a query of the layer sees, on average over the sequence."""
    if spec.sees == "chunked" and config.chunk is not None:
        chunks, rest = divmod(length, config.chunk)
        before = (chunks * config.chunk * (config.chunk + 1) + rest * (rest + 1)) / (2 * length)
        return before if config.causal else 2 * before - 1
    seen = min(length, config.window) if spec.sees == "sliding" and config.window is not None else length
    before = (seen * (seen + 1) / 2 + (length - seen) * seen) / length
    return before if config.causal else 2 * before - 1
