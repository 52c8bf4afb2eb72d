"""A rectangle of queries and keys in plain XLA: its scores, what they add to a softmax, and its gradients.

Its rows r are the queries of all heads that share a key head, one head after the other: r = G · t. On a CPU XLA hands
products, largest scores, exponentials and sums to one fused kernel (YNNPACK) as long as nothing is reshaped between.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from llm_jax.kernels import manual_axes
from llm_jax.kernels.flash_attention.bounds import Place
from llm_jax.kernels.flash_attention.spec import (
    AttentionSpec,
    MaskArrays,
    Rows,
    alibi_bias,
    first_position,
    precision,
    visible,
)


class Softmax(NamedTuple):
    """Of the keys met so far: the largest score, and the sums of exp(score - top) and of that times the value."""

    top: Float[Array, "b K r"]
    total: Float[Array, "b K r"]
    out: Float[Array, "b K r Hv"]

    @classmethod
    def empty(
        cls, spec: AttentionSpec, batch: int, queries: int, sinks: Float[Array, " N"] | None, like: Array
    ) -> "Softmax":
        """Before the first key: nothing, or the sink."""
        shape = batch, spec.kv_heads, spec.group * queries
        zero, out = manual_axes.full(shape, 0.0, like), manual_axes.full((*shape, spec.value_dim), 0.0, like)
        if sinks is None:
            return cls(zero - jnp.inf, zero, out)
        return cls(zero + _of_rows(spec, sinks, queries)[..., 0], zero + 1.0, out)

    def merged(self, other: "Softmax") -> "Softmax":
        """Of the keys of both."""
        top = jnp.maximum(self.top, other.top)
        mine, its = (jnp.exp(x.top - _finite(top)) for x in (self, other))
        out = self.out * mine[..., None] + other.out * its[..., None]
        return Softmax(top, self.total * mine + other.total * its, out)

    def result(self, dtype: jnp.dtype) -> tuple[Float[Array, "b K r Hv"], Float[Array, "b K r"]]:
        """Output and log-sum-exp; 0 and -inf of queries that have seen nothing."""
        # What has seen a key has a total of at least 1: the largest score's own.
        out = self.out * (1.0 / jnp.maximum(self.total, 1.0))[..., None]
        return out.astype(dtype), self.top + jnp.log(self.total)


def softmax(
    spec: AttentionSpec,
    at: Place,
    q: Float[Array, "b K r H"],
    k: Float[Array, "b K s H"],
    v: Float[Array, "b K s Hv"],
    slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
) -> Softmax:
    """That of this tile's keys alone. `masks`: see `_scores`."""
    scores = _scores(spec, at, q, k, slopes, masks).final
    top = scores.max(-1)
    probs = jnp.exp(scores - _finite(top)[..., None])
    return Softmax(top, probs.sum(-1), _dot("bkrs,bksh->bkrh", probs, v))


def _finite(top: Array) -> Array:
    """A row that has seen no key keeps -inf; exp(-inf - anything finite) is the 0 that it needs."""
    return jnp.maximum(top, jnp.finfo(jnp.float32).min)


class Queries(NamedTuple):
    """What the backward pass reads of queries, in any one layout."""

    q: Array
    d_out: Array
    lse: Array
    delta: Array


class Gradients(NamedTuple):
    """What a tile adds to the gradients, dq and dk still without the scale, and to the `RowSums`."""

    dq: Float[Array, "b K r H"]
    sums: tuple[Float[Array, "b K r"], ...]
    dk: Float[Array, "b K H s"]
    dv: Float[Array, "b K Hv s"]


def gradients(
    spec: AttentionSpec,
    at: Place,
    queries: Queries,
    k: Float[Array, "b K s H"],
    v: Float[Array, "b K s Hv"],
    slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
) -> Gradients:
    """From queries [b, K, r, ...]; probabilities are computed again. Keys last, as a CPU's library makes them."""
    scores = _scores(spec, at, queries.q, k, slopes, masks)
    probs = jnp.exp(scores.final - queries.lse[..., None])
    d_probs = _dot("bkrh,bksh->bkrs", queries.d_out, v)
    terms = [probs * d_probs] if spec.row_sums else []
    if slopes is not None:
        biased = probs * alibi_bias(jnp.ones(()), scores.rows, scores.keys)
        terms += [biased * d_probs, biased]
    d_scores = probs * (d_probs - queries.delta[..., None])
    if spec.softcap is not None:
        d_scores = d_scores * (1.0 - (scores.capped / spec.softcap) ** 2)
    # Sums over the rows go to that library only if the rows come last; the barrier keeps XLA from undoing it.
    q, d_out = lax.optimization_barrier((queries.q.mT, queries.d_out.mT))
    return Gradients(
        _dot("bkrs,bksh->bkrh", d_scores, k),
        tuple(term.sum(-1) for term in terms),
        _dot("bkhr,bkrs->bkhs", q, d_scores.astype(q.dtype)),
        _dot("bkhr,bkrs->bkhs", d_out, probs.astype(q.dtype)),
    )


class _Scores(NamedTuple):
    """Scores of a tile: final ones, -inf where not visible; as they left the soft cap; and the tile's two sides."""

    final: Float[Array, "b K r s"]
    capped: Float[Array, "b K r s"]
    rows: Rows
    keys: Rows


def _scores(
    spec: AttentionSpec,
    at: Place,
    q: Float[Array, "b K r H"],
    k: Float[Array, "b K s H"],
    slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
) -> _Scores:
    """Scores of the tile at this place, float32; `masks` are those of all queries and keys, padded to whole blocks."""
    rows, keys = _sides(spec, at, masks)
    capped = _dot("bkrh,bksh->bkrs", q, k) * spec.scale
    if spec.softcap is not None:
        capped = spec.softcap * jnp.tanh(capped / spec.softcap)
    scores = capped
    if slopes is not None:
        scores += alibi_bias(_of_rows(spec, slopes, at.q_size), rows, keys)
    seen = visible(spec, rows, keys)
    if at.in_loop and spec.kv_len % at.kv_size:
        real = keys.index < spec.kv_len
        seen = real if seen is None else seen & real
    return _Scores(scores if seen is None else jnp.where(seen, scores, -jnp.inf), capped, rows, keys)


def _sides(spec: AttentionSpec, at: Place, masks: MaskArrays) -> tuple[Rows, Rows]:
    """Both sides of the tile, shaped [b or 1, 1, r, 1] and [b or 1, 1, 1, s]."""

    def cut(x: Array | None, start: Array | int, size: int) -> Array | None:
        return None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis=1)

    q_index = (jnp.arange(at.q_size) + at.q_start)[None]
    kv_index = (jnp.arange(at.kv_size) + at.kv_start)[None]
    q_positions = cut(masks.q_positions, at.q_start, at.q_size)
    kv_positions = cut(masks.kv_positions, at.kv_start, at.kv_size)
    ranges = cut(masks.kv_ranges, at.q_start, at.q_size)
    rows = Rows(
        q_index,
        q_index + first_position(spec) if q_positions is None else q_positions,
        cut(masks.q_segments, at.q_start, at.q_size),
        None if ranges is None else ranges[..., 0],
        None if ranges is None else ranges[..., 1],
    )
    keys = Rows(
        kv_index,
        kv_index if kv_positions is None else kv_positions,
        cut(masks.kv_segments, at.kv_start, at.kv_size),
    )
    if at.in_loop:
        # A slice whose start is known at run time only, fused into the passes over the scores, keeps XLA from
        # vectorising them (3x slower on a CPU); the barrier makes it an array of its own.
        rows, keys = lax.optimization_barrier((rows, keys))
    at_rows = jax.tree.map(lambda x: jnp.tile(x, (1, spec.group))[:, None, :, None], rows)
    at_keys = jax.tree.map(lambda x: x[:, None, None, :], keys)
    return at_rows, at_keys


def _of_rows(spec: AttentionSpec, x: Float[Array, " N"], queries: int) -> Float[Array, "K r 1"]:
    """Slopes or sinks, float32, beside the rows of a tile of so many queries."""
    per_head = x.astype(jnp.float32).reshape(spec.kv_heads, spec.group, 1)
    return jnp.repeat(per_head, queries, axis=2).reshape(spec.kv_heads, -1, 1)


def _dot(equation: str, a: Array, b: Array) -> Array:
    """A product in b's dtype with float32 sums. Probabilities are rounded to the dtype of the values, as everywhere."""
    return jnp.einsum(equation, a.astype(b.dtype), b, precision=precision(b.dtype), preferred_element_type=jnp.float32)
