"""Attention in tiles by plain XLA: memory linear in length, blocks that nobody sees are never computed.

A few rows of the batch at a time (`bounds.TILE_BYTES`), then a loop over blocks of queries, then over the blocks of
keys between the first and the last that any of these queries may see. The bounds come from positions, segment ids and
ranges at run time; for a mask without data they are constants.

Where a device is one core of a CPU each key head of each long row goes through these loops by itself, unless heads have
slopes or sinks: its tile stays in the core's cache. Sharded arrays have to come by `shard_map`, as to every kernel:
left to `jit` alone, heads made rows would be gathered.

Short rows on a CPU have no such loops, and their memory only the bound of `bounds.WHOLE_BYTES` (`xla_short.py`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.flash_attention import xla_short
from llm_jax.kernels.flash_attention.bounds import Tiling, block_bounds, by_key_head, pad_masks, tiling
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, RowSums
from llm_jax.kernels.flash_attention.xla_tile import Queries, Softmax, gradients, softmax
from llm_jax.kernels.platform import target_platform


def supports(spec: AttentionSpec, platform: str) -> str | None:
    """Runs everything but dropout, everywhere."""
    return "no attention dropout (dropout_rate); the reference has it" if spec.dropout else None


def held_bytes(spec: AttentionSpec, platform: str) -> int:
    """Probabilities, their gradient and that of the scores, float32: of one tile, or of all that are written out."""
    tiles = tiling(spec, platform)
    count = tiles.q_blocks if tiles.whole else 1
    heads = spec.group if tiles.apart else spec.heads
    return count * 3 * 4 * tiles.rows * heads * tiles.q_block * tiles.kv_block


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
    if tiles.whole:
        return xla_short.forward(spec, tiles, q, k, v, alibi_slopes, sinks, masks)
    if tiles.apart:
        q, k, v = (_heads_as_rows(spec, x) for x in (q, k, v))
        out, lse = _forward(by_key_head(spec), tiles, q, k, v, None, None, _of_each_key_head(spec, masks))
        return _rows_as_heads(spec, out), _rows_as_heads(spec, lse)
    return _forward(spec, tiles, q, k, v, alibi_slopes, sinks, masks)


def _forward(
    spec: AttentionSpec,
    tiles: Tiling,
    q: Array,
    k: Array,
    v: Array,
    alibi_slopes: Array | None,
    sinks: Array | None,
    masks: MaskArrays,
) -> tuple[Array, Array]:
    def group(q: Array, k: Array, v: Array, masks: MaskArrays, low: Array, high: Array) -> tuple[Array, Array]:
        def query_block(xs: tuple[Array, Array]) -> tuple[Array, Array]:
            i, q_tile = xs

            def key_block(j: Array, state: Softmax) -> Softmax:
                tile = tiles.place(i, j)
                return state.merged(softmax(spec, tile, q_tile, _block(k, j), _block(v, j), alibi_slopes, masks))

            state = Softmax.empty(spec, tiles.rows, tiles.q_block, sinks, q)
            return _loop(tiles, low[i], high[i], key_block, state).result(q.dtype)

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
    queries = Queries(q, d_out, lse, delta)
    if tiles.whole:
        return xla_short.backward(spec, tiles, queries, k, v, alibi_slopes, masks)
    if tiles.apart:
        queries, k, v = jax.tree.map(partial(_heads_as_rows, spec), (queries, k, v))
        dq, dk, dv, _ = _backward(by_key_head(spec), tiles, queries, k, v, None, _of_each_key_head(spec, masks))
        dq, dk, dv = (_rows_as_heads(spec, x) for x in (dq, dk, dv))
        return dq, dk, dv, None
    return _backward(spec, tiles, queries, k, v, alibi_slopes, masks)


def _backward(
    spec: AttentionSpec,
    tiles: Tiling,
    queries: Queries,
    k: Array,
    v: Array,
    alibi_slopes: Array | None,
    masks: MaskArrays,
) -> tuple[Array, Array, Array, RowSums | None]:
    q, d_out, lse, delta = queries
    K, G, H = spec.kv_heads, spec.group, spec.head_dim

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
        def query_block(grads: _Grads, xs: tuple[Array, Queries]) -> tuple[_Grads, tuple[Array, tuple[Array, ...]]]:
            i, queries = xs
            lse_tile, delta_tile = lax.optimization_barrier((queries.lse, queries.delta))
            queries = queries._replace(lse=lse_tile, delta=delta_tile)

            def key_block(
                j: Array, state: tuple[Array, tuple[Array, ...], _Grads]
            ) -> tuple[Array, tuple[Array, ...], _Grads]:
                dq, sums, grads = state
                new = gradients(spec, tiles.place(i, j), queries, _block(k, j), _block(v, j), alibi_slopes, masks)
                sums = tuple(total + term for total, term in zip(sums, new.sums, strict=True))
                return dq + new.dq, sums, _Grads(_add_block(grads.dk, j, new.dk), _add_block(grads.dv, j, new.dv))

            shape = (tiles.rows, K, G * tiles.q_block)
            zero = manual_axes.full((*shape, H), 0.0, q)
            nothing = tuple(manual_axes.full(shape, 0.0, q) for _ in range(spec.row_sums))
            dq, sums, grads = _loop(tiles, low[i], high[i], key_block, (zero, nothing, grads))
            return grads, (dq, sums)

        # As the products come out of a CPU's library, the keys last: transposed once at the end, not for each tile.
        grads = _Grads(
            manual_axes.full((tiles.kv_blocks, tiles.rows, K, H, tiles.kv_block), 0.0, q),
            manual_axes.full((tiles.kv_blocks, tiles.rows, K, spec.value_dim, tiles.kv_block), 0.0, q),
        )
        queries = Queries(q, d_out, lse, delta)
        grads, (dq, sums) = lax.scan(query_block, grads, (jnp.arange(tiles.q_blocks), queries))
        dk = (grads.dk * spec.scale).astype(k.dtype)
        return (dq * spec.scale).astype(q.dtype), sums, _Grads(dk, grads.dv.astype(v.dtype))

    low, high = block_bounds(spec, tiles, masks)
    arrays = _split(spec, tiles, q, k, v, masks)
    # Padding sees nothing: 0 instead of inf, and what a bias makes of it may overflow.
    rest = tuple(_query_blocks(spec, tiles, x, fill) for x, fill in ((lse, jnp.inf), (d_out, 0), (delta, 0)))
    dq, sums, grads = lax.map(lambda xs: group(*xs), (*arrays, low, high, *rest))
    dk, dv = (_of_keys(spec, x) for x in grads)
    return _of_queries(spec, dq), dk, dv, RowSums(*(_of_queries(spec, x) for x in sums)) if sums else None


def _loop(tiles: Tiling, low: Array, high: Array, body, state):
    if tiles.kv_blocks == 1:
        return body(jnp.int32(0), state)
    return lax.fori_loop(low, high, body, state)


def _block(x: Array, j: Array) -> Array:
    return lax.dynamic_index_in_dim(x, j, keepdims=False)


def _add_block(total: Array, j: Array, x: Array) -> Array:
    return lax.dynamic_update_index_in_dim(total, _block(total, j) + x, j, 0)


def _query_blocks(spec: AttentionSpec, tiles: Tiling, x: Array, fill: float = 0) -> Array:
    """[B, T, N, ...] -> [groups, blocks, rows, K, r, ...], padded to whole blocks with `fill`."""
    widths = (0, 0), (0, tiles.q_padded - spec.q_len), *((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, widths, constant_values=fill)
    heads = (spec.kv_heads, spec.group)
    x = x.reshape(tiles.groups, tiles.rows, tiles.q_blocks, tiles.q_block, *heads, *x.shape[3:])
    x = jnp.moveaxis(x, (2, 3), (1, 5))
    return x.reshape(*x.shape[:4], -1, *x.shape[6:])


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


def _heads_as_rows(spec: AttentionSpec, x: Array) -> Array:
    """[B, length, K · n, ...] -> [B · K, length, n, ...]."""
    x = x.reshape(*x.shape[:2], spec.kv_heads, -1, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])


def _of_each_key_head(spec: AttentionSpec, masks: MaskArrays) -> MaskArrays:
    """A row's masks for each of those rows."""
    return jax.tree.map(lambda x: jnp.repeat(x, spec.kv_heads, axis=0), masks)


def _rows_as_heads(spec: AttentionSpec, x: Array) -> Array:
    """The other way."""
    x = jnp.moveaxis(x.reshape(-1, spec.kv_heads, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _of_queries(spec: AttentionSpec, x: Array) -> Array:
    """[groups, blocks, rows, K, r, ...] -> [B, T, N, ...]."""
    x = x.reshape(*x.shape[:4], spec.group, -1, *x.shape[5:])
    x = jnp.moveaxis(x, (1, 5), (2, 3))
    return x.reshape(spec.batch, -1, spec.heads, *x.shape[6:])[:, : spec.q_len]


def _of_keys(spec: AttentionSpec, x: Array) -> Array:
    """[groups, blocks, rows, K, H, s] -> [B, S, K, H]."""
    x = jnp.moveaxis(x, (1, 5), (2, 3))
    return x.reshape(spec.batch, -1, *x.shape[4:])[:, : spec.kv_len]
