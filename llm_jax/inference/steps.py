"""The two pure steps that decoding is made of: prompts into caches, and one token more."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.models.cache import Cache, LayerCache, Meta, known_empty
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import bind


@cache
def decoding_decoder(config: ModelConfig) -> Decoder:
    """The abstract decoder, a segment per layer, that `unstack`ed parameters belong to.

    One object per configuration: compiled programs are found by it, so all generators of one architecture share them.
    """
    return Decoder(config, segments="unrolled")


@partial(jax.jit, static_argnames="decoder", donate_argnames="caches")
def prefill(
    decoder: Decoder,
    params: Mapping[str, Any],
    caches: tuple[LayerCache, ...],
    tokens: Int[Any, "B T"],
    lengths: Int[Any, "B"],
    horizon: Int[Any, "B"] | None = None,
    prefix: Int[Any, "B"] | None = None,
) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
    """Runs the first `lengths[b] >= 1` tokens of each row; the rest of the row is padding and leaves no trace.

    Args:
      decoder: abstract, one segment per layer (`decoding_decoder`).
      params: its parameters (`models.unstack`).
      caches: empty, one per layer, of at least T slots; donated.
      tokens: int32[B, T], prompts from the left.
      lengths: int32[B], prompt tokens per row.
      horizon: int32[B], length of the document that these tokens begin, for LongRoPE; None means `lengths`.
      prefix: int32[B], how many of them, from the first, see each other from both sides (a prefix language model);
        None means none. Further tokens (`extend`, `decode_step`) see all before them in any case. Raises UserError for
        a model with state-space layers.

    Returns:
      float32 logits [B, V] after each row's last token, and the filled caches.
    """
    starts = jnp.zeros_like(lengths)
    return _run(decoder, params, tuple(map(known_empty, caches)), tokens, starts, lengths, horizon, prefix)


@partial(jax.jit, static_argnames="decoder", donate_argnames="caches")
def extend(
    decoder: Decoder,
    params: Mapping[str, Any],
    caches: tuple[LayerCache, ...],
    tokens: Int[Any, "B T"],
    kept: Int[Any, "B"],
    lengths: Int[Any, "B"],
) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
    """Runs `lengths[b] >= 1` further tokens of each row, which follow on the first `kept[b]` tokens of its caches.

    What a contiguous cache holds beyond those is forgotten; a sliding one or a state must hold no more.
    Otherwise as `prefill`.
    """
    return _run(decoder, params, caches, tokens, kept, lengths)


def _run(
    decoder: Decoder,
    params: Mapping[str, Any],
    caches: tuple[Any, ...],
    tokens: Array,
    starts: Array,
    lengths: Array,
    horizon: Array | None = None,
    prefix: Array | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    meta = Meta(starts[:, None] + index, (index < lengths[:, None]).astype(jnp.int32), starts, horizon)
    bound = bind(decoder, params)
    within = None if prefix is None else index < prefix[:, None]
    hidden, filled, _ = bound(tokens, caches=caches, meta=meta, prefix=within)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return bound.logits(last)[:, 0], filled


@partial(jax.jit, static_argnames="decoder", donate_argnames="caches")
def decode_step(
    decoder: Decoder,
    params: Mapping[str, Any],
    caches: tuple[Cache, ...],
    tokens: Int[Any, "B"],
    lengths: Int[Any, "B"],
) -> tuple[Float[Array, "B V"], tuple[Cache, ...]]:
    """One token per row: `tokens[b]` at position `lengths[b]`, the number of tokens that row's caches hold.

    Arguments as in `prefill`. Returns float32 logits [B, V] for the next token, and the caches (donated) with this
    one in.
    """
    bound = bind(decoder, params)
    meta = Meta(lengths[:, None], None, lengths)
    hidden, caches, _ = bound(tokens[:, None], caches=caches, meta=meta)  # pyright: ignore[reportAssignmentType]
    return bound.logits(hidden)[:, 0], caches
