"""Attention in tiles by plain XLA: memory linear in length, blocks that nobody sees are never computed.

A few rows of the batch at a time (`bounds.TILE_BYTES`), then a loop over blocks of queries, then over the blocks of
keys between the first and the last that any of these queries may see. The bounds come from positions, segment ids and
ranges at run time; for a mask without data they are constants.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.flash_attention.bounds import Tiling, block_bounds, pad_masks, tiling
from llm_jax.kernels.flash_attention.spec import (
    AttentionSpec,
    MaskArrays,
    Rows,
    RowSums,
    alibi_bias,
    first_position,
    precision,
    visible,
)
from llm_jax.kernels.platform import target_platform


def supports(spec: AttentionSpec, platform: str) -> str | None:
    """Runs everything but dropout, everywhere."""
    return "no attention dropout (dropout_rate); the reference has it" if spec.dropout else None


def held_bytes(spec: AttentionSpec, platform: str) -> int:
    """Probabilities, their gradient and that of the scores, float32, of one tile."""
    tiles = tiling(spec, platform)
    return 3 * 4 * tiles.rows * spec.heads * tiles.q_block * tiles.kv_block


def forward(
    spec: AttentionSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    alibi_slopes: Float[Array, " N"] | None,
    sinks: Float[Array, " N"] | None,
    masks: MaskArrays,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output in q's dtype and float32 log-sum-exp, by online softmax."""
    tiles = tiling(spec, target_platform())
    K, G = spec.kv_heads, spec.group
    shape = (tiles.rows, K, G, tiles.q_block)
    slopes = _per_head(spec, alibi_slopes)
    sink = _per_head(spec, sinks)

    def group(q: Array, k: Array, v: Array, masks: MaskArrays, low: Array, high: Array) -> tuple[Array, Array]:
        def query_block(at: tuple[Array, Array]) -> tuple[Array, Array]:
            i, q_tile = at

            def key_block(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                top, total, out = state
                k_tile, v_tile = _block(k, j), _block(v, j)
                scores = _scores(spec, tiles, q_tile, k_tile, slopes, masks, i, j).final
                new_top = jnp.maximum(top, scores.max(-1))
                # A row that has seen no key yet keeps -inf; exp(-inf - 0) is the 0 that it needs.
                finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                probs = jnp.exp(scores - finite_top[..., None])
                shrink = jnp.exp(top - finite_top)
                out = out * shrink[..., None] + _dot("bkgts,bksh->bkgth", probs, v_tile)
                return new_top, total * shrink + probs.sum(-1), out

            state = manual_axes.full(shape, -jnp.inf, q), manual_axes.full(shape, 0.0, q)
            if sink is not None:
                state = state[1] + sink[..., 0], state[1] + 1.0
            zero = manual_axes.full((*shape, spec.value_dim), 0.0, q)
            top, total, out = _loop(tiles, low[i], high[i], key_block, (*state, zero))
            out = out * jnp.where(total > 0, 1.0 / total, 0.0)[..., None]
            return out.astype(q.dtype), top + jnp.log(total)

        return lax.map(query_block, (jnp.arange(tiles.q_blocks), q))

    low, high = block_bounds(spec, tiles, masks)
    arrays = _split(spec, tiles, q, k, v, masks)
    out, lse = lax.map(lambda xs: group(*xs), (*arrays, low, high))
    return _of_queries(spec, out), _of_queries(spec, lse)


class _Grads(NamedTuple):
    dk: Array
    dv: Array


def backward(
    spec: AttentionSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    alibi_slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    delta: Float[Array, "B T N"],
) -> tuple[Array, Array, Array, RowSums | None]:
    """Gradients of q, k and v, and sums for those of slopes and sinks; probabilities are computed again from `lse`.

    `lse`: inf in a row that sees nothing. `delta`: what softmax subtracts, sum(out · d_out) less the gradient of `lse`.
    """
    tiles = tiling(spec, target_platform())
    K, G, H = spec.kv_heads, spec.group, spec.head_dim
    slopes = _per_head(spec, alibi_slopes)

    def group(
        q: Array,
        k: Array,
        v: Array,
        masks: MaskArrays,
        low: Array,
        high: Array,
        lse: Array,
        d_out: Array,
        delta: Array,
    ) -> tuple[Array, tuple[Array, ...], _Grads]:
        def query_block(grads: _Grads, at: tuple[Array, ...]) -> tuple[_Grads, tuple[Array, tuple[Array, ...]]]:
            i, q_tile, d_out_tile, *rest = at
            lse_tile, delta_tile = lax.optimization_barrier(tuple(rest))

            def key_block(
                j: Array, state: tuple[Array, tuple[Array, ...], _Grads]
            ) -> tuple[Array, tuple[Array, ...], _Grads]:
                dq, sums, grads = state
                k_tile, v_tile = _block(k, j), _block(v, j)
                scores = _scores(spec, tiles, q_tile, k_tile, slopes, masks, i, j)
                probs = jnp.exp(scores.final - lse_tile[..., None])
                d_probs = _dot("bkgth,bksh->bkgts", d_out_tile, v_tile)
                terms = [probs * d_probs] if sums else []
                if slopes is not None:
                    biased = probs * alibi_bias(jnp.ones_like(slopes), scores.rows, scores.keys)
                    terms += [biased * d_probs, biased]
                sums = tuple(total + term.sum(-1) for total, term in zip(sums, terms, strict=True))
                d_scores = probs * (d_probs - delta_tile[..., None])
                if spec.softcap is not None:
                    d_scores = d_scores * (1.0 - (scores.capped / spec.softcap) ** 2)
                dq += _dot("bkgts,bksh->bkgth", d_scores, k_tile)
                dk = _add_block(grads.dk, j, _dot("bkgts,bkgth->bkhs", d_scores, q_tile))
                dv = _add_block(grads.dv, j, _dot("bkgts,bkgth->bkhs", probs, d_out_tile))
                return dq, sums, _Grads(dk, dv)

            shape = (tiles.rows, K, G, tiles.q_block)
            zero = manual_axes.full((*shape, H), 0.0, q)
            nothing = tuple(manual_axes.full(shape, 0.0, q) for _ in range(spec.row_sums))
            dq, sums, grads = _loop(tiles, low[i], high[i], key_block, (zero, nothing, grads))
            return grads, ((dq * spec.scale).astype(q.dtype), sums)

        # As the products come out of a CPU's library, the keys last: transposed once at the end, not for each tile.
        start = _Grads(
            manual_axes.full((tiles.kv_blocks, tiles.rows, K, H, tiles.kv_block), 0.0, q),
            manual_axes.full((tiles.kv_blocks, tiles.rows, K, spec.value_dim, tiles.kv_block), 0.0, q),
        )
        grads, (dq, sums) = lax.scan(query_block, start, (jnp.arange(tiles.q_blocks), q, d_out, lse, delta))
        dk = (grads.dk * spec.scale).astype(k.dtype)
        return dq, sums, _Grads(dk, grads.dv.astype(v.dtype))

    low, high = block_bounds(spec, tiles, masks)
    arrays = _split(spec, tiles, q, k, v, masks)
    # Padding sees nothing: 0 instead of inf, and what a bias makes of it may overflow.
    rest = tuple(_query_blocks(spec, tiles, x, fill) for x, fill in ((lse, jnp.inf), (d_out, 0), (delta, 0)))
    dq, sums, grads = lax.map(lambda xs: group(*xs), (*arrays, low, high, *rest))
    dk, dv = (_of_keys(spec, x) for x in grads)
    return _of_queries(spec, dq), dk, dv, RowSums(*(_of_queries(spec, x) for x in sums)) if sums else None


class _Scores(NamedTuple):
    """Scores of a tile: final ones, -inf where not visible; as they left the soft cap; and the tile's two sides."""

    final: Float[Array, "b K G t s"]
    capped: Float[Array, "b K G t s"]
    rows: Rows
    keys: Rows


def _scores(
    spec: AttentionSpec,
    tiles: Tiling,
    q: Float[Array, "b K G t H"],
    k: Float[Array, "b K s H"],
    slopes: Array | None,
    masks: MaskArrays,
    i: Array,
    j: Array,
) -> _Scores:
    rows, keys = _sides(spec, tiles, masks, i, j)
    capped = _dot("bkgth,bksh->bkgts", q, k) * spec.scale
    if spec.softcap is not None:
        capped = spec.softcap * jnp.tanh(capped / spec.softcap)
    scores = capped if slopes is None else capped + alibi_bias(slopes, rows, keys)
    seen = visible(spec, rows, keys)
    if tiles.kv_padded > spec.kv_len:
        real = keys.index < spec.kv_len
        seen = real if seen is None else seen & real
    return _Scores(scores if seen is None else jnp.where(seen, scores, -jnp.inf), capped, rows, keys)


def _sides(spec: AttentionSpec, tiles: Tiling, masks: MaskArrays, i: Array, j: Array) -> tuple[Rows, Rows]:
    """Both sides of tile (i, j), shaped [b or 1, 1, 1, t, 1] and [b or 1, 1, 1, 1, s]."""

    def cut(x: Array | None, block: Array, size: int) -> Array | None:
        return None if x is None else lax.dynamic_slice_in_dim(x, block * size, size, axis=1)

    q_index = (jnp.arange(tiles.q_block) + i * tiles.q_block)[None]
    kv_index = (jnp.arange(tiles.kv_block) + j * tiles.kv_block)[None]
    q_positions, kv_positions = cut(masks.q_positions, i, tiles.q_block), cut(masks.kv_positions, j, tiles.kv_block)
    ranges = cut(masks.kv_ranges, i, tiles.q_block)
    rows = Rows(
        q_index,
        q_index + first_position(spec) if q_positions is None else q_positions,
        cut(masks.q_segments, i, tiles.q_block),
        None if ranges is None else ranges[..., 0],
        None if ranges is None else ranges[..., 1],
    )
    keys = Rows(kv_index, kv_index if kv_positions is None else kv_positions, cut(masks.kv_segments, j, tiles.kv_block))
    # A slice whose start is known at run time only, fused into the passes over the scores, keeps XLA from vectorising
    # them (3x slower on a CPU); the barrier makes it an array of its own.
    rows, keys = lax.optimization_barrier((rows, keys))
    at_rows = jax.tree.map(lambda x: x[:, None, None, :, None], rows)
    at_keys = jax.tree.map(lambda x: x[:, None, None, None, :], keys)
    return at_rows, at_keys


def _loop(tiles: Tiling, low: Array, high: Array, body, state):
    if tiles.kv_blocks == 1:
        return body(jnp.int32(0), state)
    return lax.fori_loop(low, high, body, state)


def _dot(equation: str, a: Array, b: Array) -> Array:
    """A product in b's dtype with float32 sums. Probabilities are rounded to the dtype of the values, as everywhere."""
    return jnp.einsum(equation, a.astype(b.dtype), b, precision=precision(b.dtype), preferred_element_type=jnp.float32)


def _block(x: Array, j: Array) -> Array:
    return lax.dynamic_index_in_dim(x, j, keepdims=False)


def _add_block(total: Array, j: Array, x: Array) -> Array:
    return lax.dynamic_update_index_in_dim(total, _block(total, j) + x, j, 0)


def _per_head(spec: AttentionSpec, x: Array | None) -> Array | None:
    return None if x is None else x.astype(jnp.float32).reshape(spec.kv_heads, spec.group, 1, 1)


def _query_blocks(spec: AttentionSpec, tiles: Tiling, x: Array, fill: float = 0) -> Array:
    """[B, T, N, ...] -> [groups, blocks, rows, K, G, t, ...], padded to whole blocks with `fill`."""
    widths = (0, 0), (0, tiles.q_padded - spec.q_len), *((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, widths, constant_values=fill)
    heads = (spec.kv_heads, spec.group)
    x = x.reshape(tiles.groups, tiles.rows, tiles.q_blocks, tiles.q_block, *heads, *x.shape[3:])
    return jnp.moveaxis(x, (2, 3), (1, 5))


def _key_blocks(spec: AttentionSpec, tiles: Tiling, x: Array) -> Array:
    """[B, S, K, H] -> [groups, blocks, rows, K, s, H], padded to whole blocks."""
    x = jnp.pad(x, ((0, 0), (0, tiles.kv_padded - spec.kv_len), (0, 0), (0, 0)))
    x = x.reshape(tiles.groups, tiles.rows, tiles.kv_blocks, tiles.kv_block, *x.shape[2:])
    return jnp.moveaxis(x, (2, 3), (1, 4))


def _split(spec: AttentionSpec, tiles: Tiling, q: Array, k: Array, v: Array, masks: MaskArrays) -> tuple:
    """Queries, keys and values in blocks, mask arrays [groups, rows, ...] padded to whole blocks."""

    def split(x: Int[Array, "B ..."]) -> Array:
        return x.reshape(tiles.groups, tiles.rows, *x.shape[1:])

    masks = jax.tree.map(split, pad_masks(spec, tiles, masks))
    return _query_blocks(spec, tiles, q), _key_blocks(spec, tiles, k), _key_blocks(spec, tiles, v), masks


def _of_queries(spec: AttentionSpec, x: Array) -> Array:
    """[groups, blocks, rows, K, G, t, ...] -> [B, T, N, ...]."""
    x = jnp.moveaxis(x, (1, 5), (2, 3))
    return x.reshape(spec.batch, -1, spec.heads, *x.shape[6:])[:, : spec.q_len]


def _of_keys(spec: AttentionSpec, x: Array) -> Array:
    """[groups, blocks, rows, K, H, s] -> [B, S, K, H]."""
    x = jnp.moveaxis(x, (1, 5), (2, 3))
    return x.reshape(spec.batch, -1, *x.shape[4:])[:, : spec.kv_len]
