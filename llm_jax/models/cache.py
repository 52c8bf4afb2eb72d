"""What attention sees of the past: `attend(q, k, v, meta)`. `Packed` keeps nothing; `ContiguousCache` keeps it all."""

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
from llm_jax.sharding import on_shards

QUERIES, KEYS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
KEPT, TOKENS = ("batch", None, "kv_heads", None), ("batch", "length")


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


@partial(jax.tree_util.register_dataclass, data_fields=["dropout"], meta_fields=[])
@dataclass(frozen=True)
class Packed:
    """No past: tokens attend causally within their own document of the same row. Used by training and scoring."""

    dropout: Dropout | None = None
    """Of attention weights, with keys [B]; the plain attention then runs, the only one that has it."""

    def attend(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, Packed]:
        options: dict[str, Any] = {}
        if self.dropout is not None:
            options = {"dropout_rate": self.dropout.rate, "implementation": "reference"}

        def attention(q: Array, k: Array, v: Array, segment_ids: Array | None, keys: Array | None) -> Array:
            return kernels.flash_attention(q, k, v, causal=True, segment_ids=segment_ids, dropout_keys=keys, **options)

        segments = None if meta.segment_ids is None else TOKENS
        keys, keys_axes = None, None
        if self.dropout is not None:
            keys, keys_axes = self.dropout.of_heads(q.shape[2]), ("batch", "heads", None)
        on = on_shards(attention, (QUERIES, KEYS, KEYS, segments, keys_axes), QUERIES)
        return on(q, k, v, meta.segment_ids, keys), self


def with_dropout(cache: Cache, dropout: Dropout) -> Packed:
    """The cache of a layer that drops attention weights. Raises UserError for one that holds a past."""
    if not isinstance(cache, Packed):
        raise UserError("attention_dropout is for training: there is none over a cache")
    return replace(cache, dropout=dropout)


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclass(frozen=True)
class ContiguousCache:
    """One row of slots per sequence: the token at position p lives in slot p.

    A row's tokens may be ragged: padding (segment id 0) is not written, and no query sees a slot past its own
    position, so that a row comes out as it would alone.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    def attend(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, ContiguousCache]:
        size = self.k.shape[1]
        # A slot past the end is dropped by the scatter below.
        slots = meta.positions if meta.segment_ids is None else jnp.where(meta.segment_ids > 0, meta.positions, size)

        def attention(q, k, v, kept_k, kept_v, positions, slots):
            rows = jnp.arange(q.shape[0])[:, None]
            kept_k = kept_k.at[rows, slots].set(k.astype(kept_k.dtype), mode="drop")
            kept_v = kept_v.at[rows, slots].set(v.astype(kept_v.dtype), mode="drop")
            kv_positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (q.shape[0], size))
            out = kernels.flash_attention(
                q,
                kept_k.astype(q.dtype),
                kept_v.astype(q.dtype),
                causal=True,
                q_positions=positions,
                kv_positions=kv_positions,
            )
            return out, kept_k, kept_v

        on = on_shards(attention, (QUERIES, KEYS, KEYS, KEPT, KEPT, TOKENS, TOKENS), (QUERIES, KEPT, KEPT))
        out, kept_k, kept_v = on(q, k, v, self.k, self.v, meta.positions, slots)
        return out, ContiguousCache(kept_k, kept_v)


def init_caches(config: ModelConfig, batch: int, max_len: int, dtype: str = "float32") -> tuple[ContiguousCache, ...]:
    """Empty caches for every layer: `batch` rows of `max_len` slots, K heads of H numbers each for keys and values."""
    config = config.resolved()
    shape = (batch, max_len, config.num_kv_heads, config.head_dim)
    return tuple(
        ContiguousCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))  # type: ignore[arg-type]
        for _ in range(config.num_layers)
    )
