"""A small decoder over caches, and its full forward, which the caches' tests hold against each other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder, unstack
from llm_jax.models.init import init_params
from llm_jax.models.parameter import bind


class Cached(NamedTuple):
    decoder: Decoder
    params: dict[str, Any]
    unstacked: dict[str, Any]
    """`params` as `step` takes them."""
    step: Callable[..., Any]
    """`(unstacked, tokens, caches, meta) -> (logits, caches)`."""
    full: Callable[..., Any]
    """`tokens -> logits`."""


def cached_model(config: ModelConfig) -> Cached:
    decoder, unrolled = Decoder(config), Decoder(config, segments="unrolled")
    params = init_params(decoder, 0)

    @jax.jit
    def step(params, tokens, caches, meta):
        bound = bind(unrolled, params)
        hidden, caches, _ = bound(tokens, caches=caches, meta=meta)
        return bound.logits(hidden), caches

    def full(tokens):
        bound = bind(decoder, params)
        return bound.logits(bound(tokens)[0])

    return Cached(decoder, params, unstack(params, decoder), step, jax.jit(full))
