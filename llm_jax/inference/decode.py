"""A batch from prompts to outputs in two programs: prefill with the first token, then many tokens at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llm_jax.inference.logits import RowParams
from llm_jax.inference.sampling import request_keys, sample
from llm_jax.inference.steps import decode_step, prefill
from llm_jax.models.cache import Cache, init_caches
from llm_jax.models.decoder import Decoder

NO_TOKEN = -1


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
    state: DecodeState, logits: Float[Array, "B V"], rows: RowParams, stop_ids: Int[Array, "B E"]
) -> tuple[DecodeState, Int[Array, "B"], Float[Array, "B"]]:
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
    return new, jnp.where(state.done, NO_TOKEN, tokens), logprobs


@partial(jax.jit, static_argnames=("decoder", "cache_len", "dtype"))
def start(
    decoder: Decoder,
    params: Mapping[str, Any],
    tokens: Int[Any, "B T"],
    lengths: Int[Any, "B"],
    max_new: Int[Any, "B"],
    words: UInt32[Any, "B 2"],
    samples: Int[Any, "B"],
    rows: RowParams,
    stop_ids: Int[Any, "B E"],
    *,
    cache_len: int,
    dtype: str,
) -> tuple[tuple[Cache, ...], DecodeState, Int[Array, "B"], Float[Array, "B"]]:
    """Prefill and the first token: `(caches, state, tokens int32[B], logprobs float32[B])`.

    `max_new[b] = 0` marks a row that only fills up the batch. `words` and `samples`: see `sampling.request_keys`.
    `stop_ids` int32[B, E] end a row, filled up with `NO_TOKEN`. `cache_len` slots of `dtype` are made per row.
    """
    caches = init_caches(decoder.config, tokens.shape[0], cache_len, dtype)
    logits, caches = prefill(decoder, params, caches, tokens, lengths)
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
    state, tokens, logprobs = _advance(state, logits, rows, stop_ids)
    return caches, state, tokens, logprobs


@partial(jax.jit, static_argnames=("decoder", "size"), donate_argnames=("caches", "state"))
def decode_chunk(
    decoder: Decoder,
    params: Mapping[str, Any],
    caches: tuple[Cache, ...],
    state: DecodeState,
    stopped: Bool[Any, "B"],
    rows: RowParams,
    stop_ids: Int[Any, "B E"],
    limit: Int[Any, ""],
    *,
    size: int,
) -> tuple[tuple[Cache, ...], DecodeState, Int[Array, "B C"], Float[Array, "B C"]]:
    """Up to `limit <= size = C` tokens per row without the host; ends early when every row is done.

    `stopped` are rows that the host has ended since (stop strings). The caches are in the loop's carry and are
    written in place. Returns `(caches, state, tokens [B, C], logprobs [B, C])`, tokens `NO_TOKEN` where a row was
    done already.
    """
    state = replace(state, done=state.done | stopped)
    batch = state.tokens.shape[0]
    outputs = (jnp.full((batch, size), NO_TOKEN, jnp.int32), jnp.zeros((batch, size), jnp.float32))

    def unfinished(carry: tuple) -> Array:
        i, _, state, _ = carry
        return (i < limit) & ~jnp.all(state.done)

    def body(carry: tuple) -> tuple:
        i, caches, state, (tokens, logprobs) = carry
        logits, caches = decode_step(decoder, params, caches, state.tokens, state.lengths)
        state = replace(state, lengths=state.lengths + ~state.done)
        state, token, logprob = _advance(state, logits, rows, stop_ids)
        return i + 1, caches, state, (tokens.at[:, i].set(token), logprobs.at[:, i].set(logprob))

    _, caches, state, (tokens, logprobs) = jax.lax.while_loop(unfinished, body, (0, caches, state, outputs))
    return caches, state, tokens, logprobs
