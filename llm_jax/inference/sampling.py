"""Drawing tokens. Every random number is a function of (seed of the request, number of the sample, position)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llm_jax.inference.logits import RowParams, penalize, transform_logits

# Sample i > 0 of a request has a key of its own, folded at a number that is no position (positions are int32).
_SAMPLES = np.uint32(1 << 31)


def seed_words(seeds: Sequence[int]) -> UInt32[np.ndarray, "B 2"]:
    """Seeds in [0, 2**64) as the two words of a Threefry key: for seeds below 2**32 the data of `jax.random.key`."""
    return np.asarray([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32).reshape(-1, 2)


def request_keys(words: UInt32[Any, "B 2"], samples: Int[Any, "B"]) -> Key[Array, "B"]:
    """Keys of samples of requests: sample 0 has `key(seed)` itself, sample i the key folded with 2**31 + i."""
    keys = jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")
    folded = jax.vmap(jax.random.fold_in)(keys, _SAMPLES + samples.astype(jnp.uint32))
    return jnp.where(samples == 0, keys, folded)


def first_of_largest(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax` in two reductions that XLA vectorises: a quarter of the time on a CPU. A row with NaN gives V - 1."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, x.shape[-1] - 1), axis=-1)


@jax.jit
def sample(
    logits: Float[Any, "B V"],
    keys: Key[Array, "B"],
    positions: Int[Any, "B"],
    rows: RowParams,
    seen: Bool[Any, "B V"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws one token per row from `transform_logits(logits, rows, seen)`.

    Row b uses `fold_in(keys[b], positions[b])`, `positions` being where the drawn token will stand: the same request
    draws the same token in any batch. The draw is the argmax of logits plus Gumbel noise (Gumbel 1954), temperature 0
    the argmax alone.

    Returns tokens int32[B] and their log-probabilities float32[B] under the model's own distribution, before penalty,
    temperature and filters.
    """

    def likeliest() -> Int[Array, "B"]:
        return first_of_largest(penalize(logits, rows, seen))

    def drawn() -> Int[Array, "B"]:
        noise = jax.vmap(lambda key, position: jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[1:]))
        return first_of_largest(transform_logits(logits, rows, seen) + noise(keys, positions))

    tokens = jax.lax.cond(jnp.all(rows.temperature == 0), likeliest, drawn)
    raw = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(raw, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(raw, axis=-1)


def top_logprobs(logits: Float[Array, "B V"], count: int) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """Ids and log-probabilities of the `count` likeliest tokens under the model's own distribution, likeliest first."""
    raw = logits.astype(jnp.float32)
    values, ids = jax.lax.top_k(raw, count)
    return ids.astype(jnp.int32), values - jax.nn.logsumexp(raw, axis=-1, keepdims=True)
