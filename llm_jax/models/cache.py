"""What attention sees of the past: `attend(q, k, v, meta)`. `Packed` keeps nothing; `ContiguousCache` keeps it all;
`SlidingCache` keeps as much as a window shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax import kernels
from llm_jax.models.config import ModelConfig
from llm_jax.sharding import on_shards

QUERIES, KEYS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
KEPT, TOKENS = ("batch", "kv_heads", None, None), ("batch", "length")
FAR = 2**30
"""A position that no causal query sees."""


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "segment_ids", "lengths"], meta_fields=[])
@dataclass(frozen=True)
class Meta:
    """Where the tokens of a call stand."""

    positions: Int[Array, "B T"]
    """Place in the document (training) or in the sequence (decoding), from 0: turns RoPE and addresses the cache."""
    segment_ids: Int[Array, "B T"] | None = None
    """Document of each token, from 1; 0 is padding. None: every row is one document without padding."""
    lengths: Int[Array, " B"] | None = None
    """Tokens of each row already in the cache; None means none."""


class Cache(Protocol):
    def attend(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, Cache]:
        """q[B,T,N,H], k, v[B,T,K,H] of the new tokens -> what they attend to [B,T,N,H], and the cache with them in."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["window"])
@dataclass(frozen=True)
class Packed:
    """No past: tokens attend causally within their own document of the same row. Used by training and scoring."""

    window: int | None = None
    """Tokens that a token sees, itself included; None means all before it."""

    def attend(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, Packed]:
        def attention(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
            return kernels.flash_attention(q, k, v, causal=True, window=self.window, segment_ids=segment_ids)

        segments = None if meta.segment_ids is None else TOKENS
        return on_shards(attention, (QUERIES, KEYS, KEYS, segments), QUERIES)(q, k, v, meta.segment_ids), self


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclass(frozen=True)
class ContiguousCache:
    """One row of slots per sequence: the token at position p lives in slot p; one past the last slot is not kept.

    A row's tokens may be ragged: padding (segment id 0) is not written, and no query sees a slot past its own
    position, so that a row comes out as it would alone.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]

    @property
    def window(self) -> None:
        return None

    def attend(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, ContiguousCache]:
        new = self.write(k, v, meta)
        if q.shape[1] == 1:
            return attend_slots(q, new.k, new.v, meta.positions[:, 0] + 1), new

        def attention(q: Array, k: Array, v: Array, positions: Array) -> Array:
            slots = jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.int32), (k.shape[0], k.shape[2]))
            k, v = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (k, v))
            return kernels.flash_attention(q, k, v, causal=True, q_positions=positions, kv_positions=slots)

        on = on_shards(attention, (QUERIES, KEPT, KEPT, TOKENS), QUERIES)
        return on(q, new.k, new.v, meta.positions), new

    def write(self, k: Array, v: Array, meta: Meta) -> ContiguousCache:
        """The cache with k, v[B,T,K,H] of the call's tokens in."""
        size = self.k.shape[2]
        slots = meta.positions if meta.segment_ids is None else jnp.where(meta.segment_ids > 0, meta.positions, size)
        return ContiguousCache(write_slots(self.k, k, slots), write_slots(self.v, v, slots))


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["window"])
@dataclass(frozen=True)
class SlidingCache:
    """A ring of as many slots as the window shows: the token at position p lives in slot p mod window.

    With fewer slots than that (no sequence gets so far), it is one row of slots, as in `ContiguousCache`. Tokens come
    in order, a row's new ones at consecutive positions; rows may be ragged.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    window: int
    """Tokens that a token sees, itself included."""

    def attend(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, SlidingCache]:
        new = self.write(k, v, meta)
        if q.shape[1] == 1:
            # A full ring holds the window's tokens and no others: all its slots are seen.
            return attend_slots(q, new.k, new.v, jnp.minimum(meta.positions[:, 0] + 1, self.k.shape[2])), new

        # The first new tokens still see what the last ones have overwritten: past and present side by side.
        present = meta.positions if meta.segment_ids is None else jnp.where(meta.segment_ids > 0, meta.positions, FAR)
        kv_positions = jnp.concatenate([self._held(meta.positions[:, 0]), present], axis=1)

        def attention(q: Array, k: Array, v: Array, kept_k: Array, kept_v: Array, at: Array, kv_at: Array) -> Array:
            k, v = (
                jnp.concatenate([jnp.swapaxes(kept, 1, 2).astype(q.dtype), x], axis=1)
                for kept, x in ((kept_k, k), (kept_v, v))
            )
            return kernels.flash_attention(q, k, v, causal=True, window=self.window, q_positions=at, kv_positions=kv_at)

        on = on_shards(attention, (QUERIES, KEYS, KEYS, KEPT, KEPT, TOKENS, TOKENS), QUERIES)
        return on(q, k, v, self.k, self.v, meta.positions, kv_positions), new

    def write(self, k: Array, v: Array, meta: Meta) -> SlidingCache:
        """The cache with k, v[B,T,K,H] of the call's tokens in: of more than fit, the last."""
        size, at = self.k.shape[2], meta.positions
        real = jnp.ones(at.shape, bool) if meta.segment_ids is None else meta.segment_ids > 0
        if size == self.window:
            last = jnp.max(jnp.where(real, at, -1), axis=1, keepdims=True)
            slots = jnp.where(real & (at > last - size), at % size, size)
        else:
            slots = jnp.where(real, at, size)
        return SlidingCache(write_slots(self.k, k, slots), write_slots(self.v, v, slots), self.window)

    def _held(self, count: Int[Array, " B"]) -> Int[Array, "B S"]:
        """Position of the token in each slot when the row has had `count`; `FAR` for an empty one."""
        size, last = self.k.shape[2], count[:, None] - 1
        slot = jnp.arange(size, dtype=jnp.int32)
        held = last - (last - slot) % size if size == self.window else jnp.broadcast_to(slot, (len(count), size))
        return jnp.where((held >= 0) & (held <= last), held, FAR)


@partial(jax.tree_util.register_dataclass, data_fields=["cache"], meta_fields=[])
@dataclass(frozen=True)
class Empty:
    """A cache known to hold nothing yet: the call's tokens see each other alone, and are then written."""

    cache: ContiguousCache | SlidingCache

    def attend(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, ContiguousCache | SlidingCache]:
        out, _ = Packed(self.cache.window).attend(q, k, v, meta)
        return out, self.cache.write(k, v, meta)


def attend_slots(
    q: Float[Array, "B 1 N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], lengths: Int[Array, " B"]
) -> Float[Array, "B 1 N H"]:
    """What one token per row attends to: the first `lengths[b]` slots."""

    def attention(q: Array, k: Array, v: Array, lengths: Array) -> Array:
        return kernels.decode_attention(q[:, 0], k.astype(q.dtype), v.astype(q.dtype), lengths)[:, None]

    return on_shards(attention, (QUERIES, KEPT, KEPT, ("batch",)), QUERIES)(q, k, v, lengths)


def write_slots(
    kept: Float[Array, "B K S H"], new: Float[Array, "B T K H"], slots: Int[Array, "B T"]
) -> Float[Array, "B K S H"]:
    """The kept array with the new tokens in their slots; a slot past the end drops its token."""

    def write(kept: Array, new: Array, slots: Array) -> Array:
        rows, new = jnp.arange(new.shape[0])[:, None], new.astype(kept.dtype)
        if new.shape[:2] != (1, 1):
            return kept.at[rows, :, slots].set(new, mode="drop")
        # What would be dropped writes back what is there: XLA makes of a single update that may be dropped a choice
        # between two whole caches, and copies them in every step of a loop (12.8 MB a token in a Llama of 6.8M).
        inside = jnp.minimum(slots, kept.shape[2] - 1)
        new = jnp.where((slots < kept.shape[2])[..., None, None], new, kept[rows, :, inside])
        kept = kept.at[rows, :, inside].set(new, mode="promise_in_bounds")
        # Else XLA writes once for attention and once for the loop's carry, which are then two buffers.
        return jax.lax.optimization_barrier(kept)

    return on_shards(write, (KEPT, KEYS, TOKENS), KEPT)(kept, new, slots)


def init_caches(
    config: ModelConfig, batch: int, max_len: int, dtype: str = "float32"
) -> tuple[ContiguousCache | SlidingCache, ...]:
    """Empty caches for every layer: `batch` rows of `max_len` slots, K heads of H numbers each for keys and values.

    Of a model with a window they have no more slots than it shows.
    """
    config = config.resolved()
    slots = max_len if config.window is None else min(max_len, config.window)
    shape = (batch, config.num_kv_heads, slots, config.head_dim)

    def cache() -> ContiguousCache | SlidingCache:
        k, v = (jnp.zeros(shape, dtype) for _ in range(2))  # pyright: ignore[reportArgumentType, reportCallIssue]
        return ContiguousCache(k, v) if config.window is None else SlidingCache(k, v, config.window)

    return tuple(cache() for _ in range(config.num_layers))


def grown[C: ContiguousCache | SlidingCache](cache: C, max_len: int) -> C:
    """The same cache with room for `max_len` tokens of a row, or for the window's; raises ValueError to shrink it."""
    slots = max_len if cache.window is None else min(max_len, cache.window)
    more = ((0, 0), (0, 0), (0, slots - cache.k.shape[2]), (0, 0))
    return replace(cache, k=jnp.pad(cache.k, more), v=jnp.pad(cache.v, more))
