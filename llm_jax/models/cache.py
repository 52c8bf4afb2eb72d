"""What attention sees of the past: `attend(q, k, v, meta, scoring)`. `Packed` keeps nothing; `ContiguousCache` keeps it
all; `SlidingCache` keeps as much as a window shows. State-space layers have a `StateCache` in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax import kernels
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.noise import Dropout
from llm_jax.models.segments import LayerSpec, layer_specs
from llm_jax.models.state_cache import StateCache, init_state
from llm_jax.sharding import on_shards

QUERIES, KEYS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
KEPT, TOKENS = ("batch", "kv_heads", None, None), ("batch", "length")
SHARED = ("batch", None, None, None)
"""One key head for all queries, which every shard of the heads holds whole."""
FAR = 2**30
"""A position that no causal query sees."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segment_ids", "lengths", "horizon", "visible"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Meta:
    """Where the tokens of a call stand."""

    positions: Int[Array, "B T"]
    """Place in the document (training) or in the sequence (decoding), from 0: turns RoPE and addresses the cache."""
    segment_ids: Int[Array, "B T"] | None = None
    """Document of each token, from 1; 0 is padding. None: every row is one document without padding."""
    lengths: Int[Array, " B"] | None = None
    """Tokens of each row already in the cache; None means none."""
    horizon: Int[Array, " B"] | None = None
    """Length of each row's document, for rotary scalings that ask; None means up to the call's last token."""
    visible: Int[Array, "B T 2"] | None = None
    """Places in the row, [start, end), that each token attends to, of those at positions not beyond its own; None means
    its own document. For documents that share a part (`data/rows.py`); without a past only."""


@partial(jax.tree_util.register_dataclass, data_fields=["alibi_slopes", "sinks"], meta_fields=["scale", "softcap"])
@dataclass(frozen=True)
class Scoring:
    """How a query scores keys, beside their product; see `kernels.flash_attention`."""

    scale: float | None = None
    """Of the product; None means head_dim ** -0.5."""
    softcap: float | None = None
    alibi_slopes: Float[Array, " N"] | None = None
    sinks: Float[Array, " N"] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The static part, by the names of the kernels' arguments."""
        return {"scale": self.scale, "softcap": self.softcap}

    @property
    def arrays(self) -> dict[str, Array | None]:
        """The rest."""
        return {"alibi_slopes": self.alibi_slopes, "sinks": self.sinks}

    @property
    def axes(self) -> dict[str, tuple[str] | None]:
        """Logical axes of `arrays`."""
        return {name: None if x is None else ("heads",) for name, x in self.arrays.items()}


PLAIN = Scoring()


class Cache(Protocol):
    def attend(self, q: Array, k: Array, v: Array, meta: Meta, scoring: Scoring = PLAIN) -> tuple[Array, Cache]:
        """q[B,T,N,H], k, v[B,T,K,H] of the new tokens -> what they attend to [B,T,N,H], and the cache with them in."""
        ...


@partial(jax.tree_util.register_dataclass, data_fields=["dropout", "ends"], meta_fields=["window", "chunk", "causal"])
@dataclass(frozen=True)
class Packed:
    """No past: tokens attend within their own document of the same row. Used by training and scoring."""

    window: int | None = None
    """Tokens that a token sees, itself included; None means all before it."""
    chunk: int | None = None
    """Positions of a chunk, beyond which no token sees; None means there are none."""
    dropout: Dropout | None = None
    """Of attention weights, with keys [B]; the plain attention then runs, the only one that has it."""
    causal: bool = True
    """Whether to tokens before them alone; else to both sides, in a window to `window` - 1 on either."""
    ends: Int[Array, "B T"] | None = None
    """In place of `causal`: one past the last place in the row that each token sees (`prefix.sight_ends`)."""

    def attend(self, q: Array, k: Array, v: Array, meta: Meta, scoring: Scoring = PLAIN) -> tuple[Array, Packed]:
        options: dict[str, Any] = {
            "causal": self.causal and self.ends is None,
            "window": self.window,
            "chunk": self.chunk,
            **scoring.options,
        }
        if self.dropout is not None:
            options |= {"dropout_rate": self.dropout.rate, "implementation": "reference"}
        # Chunks are counted from the start of a document, and a part that documents share may lie behind what follows
        # on it; the other masks are the same by index.
        positions = meta.positions if self.chunk is not None or meta.visible is not None else None
        segments, ranges = (meta.segment_ids, None) if meta.visible is None else (None, meta.visible)
        if self.ends is not None:
            ranges = jnp.stack([jnp.zeros_like(self.ends), self.ends], axis=-1)
        masks = {"segment_ids": segments, "q_positions": positions, "kv_positions": positions}

        def attention(q: Array, k: Array, v: Array, masks: Any, ranges: Any, keys: Array | None, more: Any) -> Array:
            return kernels.flash_attention(q, k, v, dropout_keys=keys, kv_ranges=ranges, **masks, **options, **more)

        keys, keys_axes = None, None
        if self.dropout is not None:
            keys, keys_axes = self.dropout.of_heads(q.shape[2]), ("batch", "heads", None)
        masks_axes = {name: None if x is None else TOKENS for name, x in masks.items()}
        ranges_axes = None if ranges is None else (*TOKENS, None)
        on = on_shards(attention, (QUERIES, KEYS, KEYS, masks_axes, ranges_axes, keys_axes, scoring.axes), QUERIES)
        return on(q, k, v, masks, ranges, keys, scoring.arrays), self


def with_dropout(cache: Cache, dropout: Dropout) -> Packed:
    """The cache of a layer that drops attention weights. Raises UserError for one that holds a past."""
    if not isinstance(cache, Packed):
        raise UserError("attention_dropout is for training: there is none over a cache")
    return replace(cache, dropout=dropout)


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["chunk"])
@dataclass(frozen=True)
class ContiguousCache:
    """One row of slots per sequence: the token at position p lives in slot p; one past the last slot is not kept.

    A row's tokens may be ragged: padding (segment id 0) is not written, and no query sees a slot past its own
    position, so that a row comes out as it would alone.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    chunk: int | None = None
    """Positions of a chunk, beyond which no token sees; None means there are none."""

    @property
    def window(self) -> None:
        return None

    def attend(
        self, q: Array, k: Array, v: Array, meta: Meta, scoring: Scoring = PLAIN
    ) -> tuple[Array, ContiguousCache]:
        new = self.write(k, v, meta)
        if q.shape[1] == 1:
            at = meta.positions[:, 0]
            starts = None if self.chunk is None else at // self.chunk * self.chunk
            return attend_slots(q, new.k, new.v, at + 1, starts, scoring), new

        def attention(q: Array, k: Array, v: Array, positions: Array, more: Any) -> Array:
            slots = jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.int32), (k.shape[0], k.shape[2]))
            k, v = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (k, v))
            options = {"chunk": self.chunk, "q_positions": positions, "kv_positions": slots, **scoring.options}
            return kernels.flash_attention(q, k, v, causal=True, **options, **more)

        on = on_shards(attention, (QUERIES, KEPT, KEPT, TOKENS, scoring.axes), QUERIES)
        return on(q, new.k, new.v, meta.positions, scoring.arrays), new

    def write(self, k: Array, v: Array, meta: Meta) -> ContiguousCache:
        """The cache with k, v[B,T,K,H] of the call's tokens in."""
        size = self.k.shape[2]
        slots = meta.positions if meta.segment_ids is None else jnp.where(meta.segment_ids > 0, meta.positions, size)
        return replace(self, k=write_slots(self.k, k, slots), v=write_slots(self.v, v, slots))


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

    def attend(self, q: Array, k: Array, v: Array, meta: Meta, scoring: Scoring = PLAIN) -> tuple[Array, SlidingCache]:
        new = self.write(k, v, meta)
        # ALiBi asks how far a slot's token is, and a ring's slots are in no order.
        if q.shape[1] == 1 and scoring.alibi_slopes is None:
            # A full ring holds the window's tokens and no others: all its slots are seen.
            seen = jnp.minimum(meta.positions[:, 0] + 1, self.k.shape[2])
            return attend_slots(q, new.k, new.v, seen, None, scoring), new

        # The first new tokens still see what the last ones have overwritten: past and present side by side.
        present = meta.positions if meta.segment_ids is None else jnp.where(meta.segment_ids > 0, meta.positions, FAR)
        kv_positions = jnp.concatenate([self._held(meta.positions[:, 0]), present], axis=1)

        def attention(
            q: Array, k: Array, v: Array, kept_k: Array, kept_v: Array, at: Array, kv_at: Array, more: Any
        ) -> Array:
            k, v = (
                jnp.concatenate([jnp.swapaxes(kept, 1, 2).astype(q.dtype), x], axis=1)
                for kept, x in ((kept_k, k), (kept_v, v))
            )
            options = {"window": self.window, "q_positions": at, "kv_positions": kv_at, **scoring.options}
            return kernels.flash_attention(q, k, v, causal=True, **options, **more)

        on = on_shards(attention, (QUERIES, KEYS, KEYS, KEPT, KEPT, TOKENS, TOKENS, scoring.axes), QUERIES)
        return on(q, k, v, self.k, self.v, meta.positions, kv_positions, scoring.arrays), new

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


@partial(jax.tree_util.register_dataclass, data_fields=["k"], meta_fields=["rank"])
@dataclass(frozen=True)
class LatentCache:
    """Of latent attention: compressed vector and turned key of the token at position p lie side by side in slot p."""

    k: Float[Array, "B 1 S R"]
    rank: int
    """Length of the compressed vector, which comes first."""

    @property
    def window(self) -> None:
        return None

    def attend(
        self, q: Float[Array, "B T N R"], k: Float[Array, "B T 1 R"], meta: Meta, scoring: Scoring
    ) -> tuple[Float[Array, "B T N C"], LatentCache]:
        """Queries in the space of what is kept -> weighted sums of compressed vectors, and the cache with k in."""
        new = self.write(k, meta)
        if q.shape[1] == 1:
            # The sum over the turned key comes along and is cut off: cheaper than a copy of the cache without it.
            out = attend_slots(q, new.k, new.k, meta.positions[:, 0] + 1, None, scoring, SHARED)
            return out[..., : self.rank], new

        def attention(q: Array, k: Array, positions: Array) -> Array:
            slots = jnp.broadcast_to(jnp.arange(k.shape[2], dtype=jnp.int32), (k.shape[0], k.shape[2]))
            k = jnp.swapaxes(k, 1, 2).astype(q.dtype)
            options = {"q_positions": positions, "kv_positions": slots, **scoring.options}
            return kernels.flash_attention(q, k, k[..., : self.rank], causal=True, **options)

        on = on_shards(attention, (QUERIES, SHARED, TOKENS), QUERIES)
        return on(q, new.k, meta.positions), new

    def write(self, k: Float[Array, "B T 1 R"], meta: Meta) -> LatentCache:
        """The cache with the call's tokens in."""
        size = self.k.shape[2]
        slots = meta.positions if meta.segment_ids is None else jnp.where(meta.segment_ids > 0, meta.positions, size)
        return replace(self, k=write_slots(self.k, k, slots, SHARED))


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "ends"], meta_fields=[])
@dataclass(frozen=True)
class Empty:
    """A cache known to hold nothing yet: the call's tokens see each other alone, and are then written."""

    cache: ContiguousCache | SlidingCache | LatentCache
    ends: Int[Array, "B T"] | None = None
    """As of `Packed`."""

    def attend(
        self, q: Array, k: Array, v: Array, meta: Meta, scoring: Scoring = PLAIN
    ) -> tuple[Array, ContiguousCache | SlidingCache]:
        assert not isinstance(self.cache, LatentCache)  # Whose mixer attends without it, and writes.
        chunk = self.cache.chunk if isinstance(self.cache, ContiguousCache) else None
        out, _ = Packed(self.cache.window, chunk, ends=self.ends).attend(q, k, v, meta, scoring)
        return out, self.cache.write(k, v, meta)


LayerCache = ContiguousCache | SlidingCache | LatentCache | StateCache | None
"""What a layer keeps in decoding; one that mixes nothing keeps nothing."""


def known_empty(cache: LayerCache) -> Any:
    """A cache that holds nothing yet, for a first call that makes use of that where it can."""
    return Empty(cache) if isinstance(cache, ContiguousCache | SlidingCache | LatentCache) else cache


def attend_slots(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int[Array, " B"],
    starts: Int[Array, " B"] | None,
    scoring: Scoring,
    kept: tuple[str | None, ...] = KEPT,
) -> Float[Array, "B 1 N H"]:
    """What one token per row attends to: slots `starts[b]` (None: 0) to `lengths[b]`."""

    def attention(q: Array, k: Array, v: Array, lengths: Array, starts: Array | None, more: Any) -> Array:
        k, v, options = k.astype(q.dtype), v.astype(q.dtype), scoring.options
        return kernels.decode_attention(q[:, 0], k, v, lengths, starts=starts, **options, **more)[:, None]

    rows = ("batch",)
    on = on_shards(attention, (QUERIES, kept, kept, rows, None if starts is None else rows, scoring.axes), QUERIES)
    return on(q, k, v, lengths, starts, scoring.arrays)


def write_slots(
    kept: Float[Array, "B K S H"],
    new: Float[Array, "B T K H"],
    slots: Int[Array, "B T"],
    axes: tuple[str | None, ...] = KEPT,
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

    fresh = (axes[0], "length", axes[1], None)
    return on_shards(write, (axes, fresh, TOKENS), axes)(kept, new, slots)


def init_caches(config: ModelConfig, batch: int, max_len: int, dtype: str = "float32") -> tuple[LayerCache, ...]:
    """Empty caches for every layer: `batch` rows of `max_len` slots, K heads of H numbers each for keys and values.

    Those of sliding layers have no more slots than their window shows; latent attention keeps its one vector a token,
    and state-space layers have states. Raises UserError for an encoder, which sees what comes later.
    """
    config = config.resolved()
    if not config.causal:
        raise UserError("an encoder (model.causal=False) has no cache: its tokens see those that come later")

    def cache(spec: LayerSpec) -> LayerCache:
        if spec.mixer == "none":
            return None
        if spec.mixer == "latent":
            kept = config.latent.kv_rank + config.latent.rope_dim
            return LatentCache(jnp.zeros((batch, 1, max_len, kept), dtype), config.latent.kv_rank)
        if spec.mixer != "attention":
            return init_state(config.mamba, batch, dtype)
        sees = spec.sees
        slots = min(max_len, config.window) if sees == "sliding" and config.window else max_len
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        k, v = (jnp.zeros(shape, dtype) for _ in range(2))  # pyright: ignore[reportArgumentType, reportCallIssue]
        if sees == "sliding" and config.window:
            return SlidingCache(k, v, config.window)
        return ContiguousCache(k, v, config.chunk if sees == "chunked" else None)

    return tuple(cache(spec) for spec in layer_specs(config))


def grown[C: LayerCache](cache: C, max_len: int) -> C:
    """The same cache with room for `max_len` tokens of a row, or for the window's; raises ValueError to shrink it.

    A state has room for any number.
    """
    if cache is None or isinstance(cache, StateCache):
        return cache
    slots = max_len if cache.window is None else min(max_len, cache.window)
    more = ((0, 0), (0, 0), (0, slots - cache.k.shape[2]), (0, 0))
    if isinstance(cache, LatentCache):
        return replace(cache, k=jnp.pad(cache.k, more))
    return replace(cache, k=jnp.pad(cache.k, more), v=jnp.pad(cache.v, more))
