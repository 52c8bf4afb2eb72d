"""Attention of short rows by plain XLA, on a CPU: no loops over blocks.

Each block of queries meets at once, as one tile, the keys that it may see as far as shapes tell (`bounds.key_ranges`).
Nothing is added up over tiles, and nothing is cut out or written at a place that only the running program knows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from llm_jax.kernels import manual_axes
from llm_jax.kernels.flash_attention.bounds import Place, Tiling, key_ranges
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, RowSums
from llm_jax.kernels.flash_attention.xla_tile import Queries, Softmax, gradients, softmax


def forward(
    spec: AttentionSpec,
    tiles: Tiling,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    slopes: Float[Array, " N"] | None,
    sinks: Float[Array, " N"] | None,
    masks: MaskArrays,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """As `xla.forward`."""

    def group(q: Array, k: Array, v: Array, masks: MaskArrays) -> tuple[Array, Array]:
        made = []
        for at, rows, keys in _places(spec, tiles):
            q_tile, k_tile, v_tile = _tile_of_queries(spec, rows, q), _tile_of_keys(keys, k), _tile_of_keys(keys, v)
            state = softmax(spec, at, q_tile, k_tile, v_tile, slopes, masks)
            if sinks is not None:
                state = state.merged(Softmax.empty(spec, tiles.rows, at.q_size, sinks, q))
            made.append(state.result(q.dtype))
        return _joined(spec, made)

    return _by_groups(tiles, group, (q, k, v, masks))


def backward(
    spec: AttentionSpec,
    tiles: Tiling,
    queries: Queries,
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
) -> tuple[Array, Array, Array, RowSums | None]:
    """As `xla.backward`."""

    def group(queries: Queries, k: Array, v: Array, masks: MaskArrays) -> tuple[Array, Array, Array, RowSums | None]:
        made = []
        dk, dv = (
            manual_axes.full((tiles.rows, spec.kv_heads, size, spec.kv_len), 0.0, k)
            for size in (spec.head_dim, spec.value_dim)
        )
        for at, rows, keys in _places(spec, tiles):
            # What is cut out of an array of all queries within the passes over a tile makes them slower.
            of_block = lax.optimization_barrier(jax.tree.map(partial(_tile_of_queries, spec, rows), queries))
            new = gradients(spec, at, of_block, _tile_of_keys(keys, k), _tile_of_keys(keys, v), slopes, masks)
            dk, dv = dk.at[..., keys].add(new.dk), dv.at[..., keys].add(new.dv)
            made.append(((new.dq * spec.scale).astype(k.dtype), new.sums))
        dq, sums = _joined(spec, made)
        dk, dv = (jnp.moveaxis(x.astype(k.dtype), 3, 1) for x in (dk * spec.scale, dv))
        return dq, dk, dv, RowSums(*sums) if sums else None

    return _by_groups(tiles, group, (queries, k, v, masks))


def _places(spec: AttentionSpec, tiles: Tiling) -> list[tuple[Place, slice, slice]]:
    """The tiles: place, queries and keys."""
    starts = range(0, spec.q_len, tiles.q_block)
    queries = [slice(start, min(start + tiles.q_block, spec.q_len)) for start in starts]
    return [
        (Place(rows.start, rows.stop - rows.start, keys.start, keys.stop - keys.start), rows, keys)
        for rows, keys in zip(queries, key_ranges(spec, tiles), strict=True)
    ]


def _tile_of_queries(spec: AttentionSpec, rows: slice, x: Float[Array, "b T N ..."]) -> Float[Array, "b K r ..."]:
    tile = x[:, rows]
    tile = jnp.moveaxis(tile.reshape(*tile.shape[:2], spec.kv_heads, spec.group, *tile.shape[3:]), 1, 3)
    return tile.reshape(*tile.shape[:2], -1, *tile.shape[4:])


def _tile_of_keys(keys: slice, x: Float[Array, "b S K H"]) -> Float[Array, "b K s H"]:
    return jnp.moveaxis(x[:, keys], 1, 2)


def _joined(spec: AttentionSpec, made: list) -> Any:
    """Trees of [b, K, r, ...], one for each block of queries, as one of [b, T, N, ...]."""

    def join(*blocks: Array) -> Array:
        apart = [x.reshape(*x.shape[:2], spec.group, -1, *x.shape[3:]) for x in blocks]
        x = jnp.moveaxis(jnp.concatenate(apart, 3), 3, 1)
        return x.reshape(*x.shape[:2], spec.heads, *x.shape[4:])

    return jax.tree.map(join, *made)


def _by_groups(tiles: Tiling, run: Any, arrays: Any) -> Any:
    """`run` for so many rows of the batch at a time."""
    split = jax.tree.map(lambda x: x.reshape(tiles.groups, tiles.rows, *x.shape[1:]), arrays)
    made = lax.map(lambda xs: run(*xs), split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)
