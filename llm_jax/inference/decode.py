"""A batch from prompts to outputs in two programs: prefill with the first token, then many tokens at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llm_jax.inference.logits import RowParams
from llm_jax.inference.sampling import request_keys, sample, top_logprobs
from llm_jax.inference.steps import decode_step, extend, prefill
from llm_jax.models.cache import LayerCache, grown, init_caches
from llm_jax.models.decoder import Decoder

NO_TOKEN = -1
Caches = tuple[LayerCache, ...]


class Drawn(NamedTuple):
    """New tokens of each row: [B], or [B, C] of several steps."""

    tokens: Int[Array, "B"]
    """`NO_TOKEN` for rows that are done."""
    logprobs: Float[Array, "B"]
    """Under the model's own distribution (no penalty, temperature or filter), in nats."""
    top_ids: Int[Array, "B K"] | None
    """The K likeliest tokens, likeliest first; None where K is 0."""
    top_logprobs: Float[Array, "B K"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What a batch carries from token to token, beside its caches."""

    tokens: Int[Array, "B"]
    """Newest token of each row, not in the caches yet."""
    lengths: Int[Array, "B"]
    """Tokens in the caches."""
    remaining: Int[Array, "B"]
    """New tokens a row may still get."""
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"]
    """Tokens of prompt and output so far, for the repetition penalty."""
    keys: Key[Array, "B"]


def _advance(
    state: DecodeState, logits: Float[Array, "B V"], rows: RowParams, stop_ids: Int[Array, "B E"], top: int
) -> tuple[DecodeState, Drawn]:
    """Draws a token for every row that is not done; rows that are get `NO_TOKEN`."""
    tokens, logprobs = sample(logits, state.keys, state.lengths, rows, state.seen)
    vocab_size = logits.shape[-1]
    marked = jnp.where(state.done, vocab_size, tokens)
    remaining = state.remaining - ~state.done
    ended = jnp.any(tokens[:, None] == stop_ids, axis=-1) | (remaining <= 0)
    new = replace(
        state,
        tokens=jnp.where(state.done, state.tokens, tokens),
        remaining=remaining,
        done=state.done | ended,
        seen=state.seen.at[jnp.arange(tokens.shape[0]), marked].set(True, mode="drop"),
    )
    ids, values = top_logprobs(logits, top) if top else (None, None)
    return new, Drawn(jnp.where(state.done, NO_TOKEN, tokens), logprobs, ids, values)


def _first(
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    max_new: Int[Any, "B"],
    words: UInt32[Any, "B 2"],
    samples: Int[Any, "B"],
    rows: RowParams,
    stop_ids: Int[Any, "B E"],
    top: int,
) -> tuple[DecodeState, Drawn]:
    """The state after `lengths[b]` of `tokens`, whose last gave `logits`, and the first new token."""
    batch, vocab_size = logits.shape
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    seen = jnp.zeros((batch, vocab_size), bool)
    seen = seen.at[jnp.arange(batch)[:, None], jnp.where(real, tokens, vocab_size)].set(True, mode="drop")
    state = DecodeState(
        tokens=jnp.zeros(batch, jnp.int32),
        lengths=lengths,
        remaining=max_new,
        done=max_new <= 0,
        seen=seen,
        keys=request_keys(words, samples),
    )
    return _advance(state, logits, rows, stop_ids, top)


@partial(jax.jit, static_argnames=("decoder", "cache_len", "dtype", "top"))
def start(
    decoder: Decoder,
    params: Mapping[str, Any],
    tokens: Int[Any, "P T"],
    lengths: Int[Any, "P"],
    source: Int[Any, "B"] | None,
    max_new: Int[Any, "B"],
    words: UInt32[Any, "B 2"],
    samples: Int[Any, "B"],
    rows: RowParams,
    stop_ids: Int[Any, "B E"],
    prefix: Int[Any, "P"] | None,
    *,
    cache_len: int,
    dtype: str,
    top: int,
) -> tuple[Caches, DecodeState, Drawn]:
    """Prefill of P prompts and the first token of B rows.

    Row b goes on from prompt `source[b]`, so that the samples of a prompt share its prefill; None: row b from prompt b.
    `max_new[b] = 0` marks a row that only fills up the batch. `words` and `samples`: see `sampling.request_keys`.
    `stop_ids` int32[B, E] end a row, filled up with `NO_TOKEN`. `cache_len` slots of `dtype` are made per row. `top`:
    how many of the likeliest tokens are told beside the one drawn. `prefix`: see `prefill`.
    """
    caches = init_caches(decoder.config, tokens.shape[0], cache_len, dtype)
    logits, caches = prefill(decoder, params, caches, tokens, lengths, prefix=prefix)
    if source is not None:
        caches, logits, tokens, lengths = jax.tree.map(lambda x: x[source], (caches, logits, tokens, lengths))
    return caches, *_first(logits, tokens, lengths, max_new, words, samples, rows, stop_ids, top)


@partial(jax.jit, static_argnames=("decoder", "top"), donate_argnames="caches")
def resume(
    decoder: Decoder,
    params: Mapping[str, Any],
    caches: Caches,
    tokens: Int[Any, "B T"],
    lengths: Int[Any, "B"],
    fresh: Int[Any, "B F"],
    kept: Int[Any, "B"],
    max_new: Int[Any, "B"],
    words: UInt32[Any, "B 2"],
    samples: Int[Any, "B"],
    rows: RowParams,
    stop_ids: Int[Any, "B E"],
    *,
    top: int,
) -> tuple[Caches, DecodeState, Drawn]:
    """`start` from caches that hold the first `kept[b]` of `lengths[b]` tokens; `fresh[b]` are the others."""
    logits, caches = extend(decoder, params, caches, fresh, kept, lengths - kept)
    return caches, *_first(logits, tokens, lengths, max_new, words, samples, rows, stop_ids, top)


@partial(jax.jit, static_argnames=("decoder", "size", "top"), donate_argnames=("caches", "state"))
def decode_chunk(
    decoder: Decoder,
    params: Mapping[str, Any],
    caches: Caches,
    state: DecodeState,
    stopped: Bool[Any, "B"],
    rows: RowParams,
    stop_ids: Int[Any, "B E"],
    limit: Int[Any, ""],
    *,
    size: int,
    top: int,
) -> tuple[Caches, DecodeState, Drawn]:
    """Up to `limit <= size = C` tokens per row without the host; ends early when every row is done.

    `stopped` are rows that the host has ended since (stop strings). The caches are in the loop's carry and are
    written in place. Of what is drawn [B, C], tokens are `NO_TOKEN` where a row was done already.
    """
    state = replace(state, done=state.done | stopped)
    batch = state.tokens.shape[0]

    def several(value: Any, dtype: Any, *more: int) -> Array:
        return jnp.full((batch, size, *more), value, dtype)

    tops = (several(NO_TOKEN, jnp.int32, top), several(0, jnp.float32, top)) if top else (None, None)
    outputs = Drawn(several(NO_TOKEN, jnp.int32), several(0, jnp.float32), *tops)

    def unfinished(carry: tuple) -> Array:
        i, _, state, _ = carry
        return (i < limit) & ~jnp.all(state.done)

    def body(carry: tuple) -> tuple:
        i, caches, state, outputs = carry
        logits, caches = decode_step(decoder, params, caches, state.tokens, state.lengths)
        state = replace(state, lengths=state.lengths + ~state.done)
        state, drawn = _advance(state, logits, rows, stop_ids, top)
        return i + 1, caches, state, jax.tree.map(lambda all, new: all.at[:, i].set(new), outputs, drawn)

    _, caches, state, outputs = jax.lax.while_loop(unfinished, body, (0, caches, state, outputs))
    return caches, state, outputs


@partial(jax.jit, static_argnames=("decoder", "cache_len", "dtype"))
def refill(
    decoder: Decoder,
    params: Mapping[str, Any],
    tokens: Int[Any, "B T"],
    lengths: Int[Any, "B"],
    prefix: Int[Any, "B"] | None,
    *,
    cache_len: int,
    dtype: str,
) -> Caches:
    """Caches made anew of the first `lengths[b]` of `tokens`, as the beginning of texts that are one token longer.
    `prefix`: see `prefill`.

    LongRoPE turns all of a text otherwise once it is longer than the trained length, and every layer's keys with it.
    """
    caches = init_caches(decoder.config, tokens.shape[0], cache_len, dtype)
    return prefill(decoder, params, caches, tokens, lengths, lengths + 1, prefix)[1]


@partial(jax.jit, static_argnames="cache_len")
def grow(caches: Caches, *, cache_len: int) -> Caches:
    """The same caches with `cache_len` slots per row: attention reads them all, so they are made when needed."""
    return tuple(grown(cache, cache_len) for cache in caches)
