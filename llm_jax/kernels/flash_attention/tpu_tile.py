"""One tile of scores in a TPU kernel, and what the kernels hand it of the mask, the slopes and the sinks."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.flash_attention.bounds import Tiling, pad_masks
from llm_jax.kernels.flash_attention.spec import (
    AttentionSpec,
    MaskArrays,
    Rows,
    alibi_bias,
    first_position,
    precision,
    visible,
)
from llm_jax.kernels.flash_attention.tpu_schedule import inner, outer

LANES = 128
VMEM_LIMIT = 48 * 2**20
"""Bytes of vector memory for a kernel; the chips have 64 MiB (v5p, TPU7x) or 128."""
LOG2_E = math.log2(math.e)
"""Exponentials are powers of 2, as the hardware has them: scores are multiplied by this."""


class Extras(NamedTuple):
    """What takes part in a tile beside q, k and v; in a kernel, its references. What is absent is None."""

    q_marks: Int[Array, "B T marks"] | None
    """Positions, segments, starts and ends of the queries, those that there are."""
    kv_marks: Int[Array, "B marks S"] | None
    """Positions and segments of the keys."""
    slopes: Float[Array, " N"] | None
    sinks: Float[Array, " N"] | None


def extras(
    spec: AttentionSpec, tiles: Tiling, masks: MaskArrays, slopes: Any, sinks: Any, *, by_keys: bool = False
) -> Extras:
    """The outer side's marks are columns of [length, marks], the inner side's rows of [marks, length]."""
    masks = pad_masks(spec, tiles, masks)
    kv_positions = masks.kv_positions
    if spec.positions and kv_positions is None:
        kv_positions = jnp.broadcast_to(jnp.arange(tiles.kv_padded), (spec.batch, tiles.kv_padded))
    starts, ends = (None, None) if masks.kv_ranges is None else (masks.kv_ranges[..., 0], masks.kv_ranges[..., 1])

    def marks(axis: int, *arrays: Array | None) -> Array | None:
        present = [x for x in arrays if x is not None]
        return jnp.stack(present, axis) if present else None

    q_marks = marks(1 if by_keys else 2, masks.q_positions, masks.q_segments, starts, ends)
    kv_marks = marks(2 if by_keys else 1, kv_positions, masks.kv_segments)
    f32 = (None if x is None else x.astype(jnp.float32) for x in (slopes, sinks))
    return Extras(q_marks, kv_marks, *f32)


def extras_specs(tiles: Tiling, given: Extras, place: Any, *, by_keys: bool = False) -> Extras:
    """Block specs; `place(*grid indices, steps)` is (row of the batch, step)."""

    def of_outer(size: int, x: Array | None) -> Any:
        return x if x is None else pl.BlockSpec((None, size, x.shape[2]), lambda *at: (*_outer_at(place(*at)), 0))

    def of_inner(size: int, x: Array | None) -> Any:
        return x if x is None else pl.BlockSpec((None, x.shape[1], size), lambda *at: _inner_at(place(*at)))

    def whole(x: Array | None) -> Any:
        return x if x is None else pl.BlockSpec(memory_space=pltpu.SMEM)

    q, kv = (of_inner, of_outer) if by_keys else (of_outer, of_inner)
    return Extras(
        q(tiles.q_block, given.q_marks), kv(tiles.kv_block, given.kv_marks), whole(given.slopes), whole(given.sinks)
    )


def _outer_at(place: tuple[Any, Any]) -> tuple[Any, Any]:
    return place[0], outer(place[1])


def _inner_at(place: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    return place[0], 0, inner(place[1])


class Scores(NamedTuple):
    """Of a tile, queries by keys or (`by_keys`) keys by queries."""

    final: Float[Array, "outer inner"]
    """In base 2; -inf where not visible."""
    tanh: Float[Array, "outer inner"] | None
    """Where there is a soft cap."""
    seen: Bool[Array, "outer inner"] | None
    """None: everything is visible."""
    rows: Rows
    keys: Rows


def tile_scores(
    spec: AttentionSpec,
    tiles: Tiling,
    q: Float[Array, "q H"],
    k: Float[Array, "kv H"],
    given: Extras,
    head: Any,
    step: Any,
    *,
    masked: bool,
    by_keys: bool = False,
) -> Scores:
    """Scores of query head `head` in the two blocks of `step`."""
    q_at, kv_at = (inner(step), outer(step)) if by_keys else (outer(step), inner(step))
    q_axis, kv_axis = (1, 0) if by_keys else (0, 1)
    rows = _side(spec, q_at, tiles.q_block, q_axis, first_position(spec), given.q_marks)
    keys = _side(spec, kv_at, tiles.kv_block, kv_axis, 0, given.kv_marks)
    raw = dot(k, q, 1, 1) if by_keys else dot(q, k, 1, 1)
    tanh = None
    if spec.softcap is None:
        final = raw * (spec.scale * LOG2_E)
    else:
        tanh = jnp.tanh(raw * (spec.scale / spec.softcap))
        final = tanh * (spec.softcap * LOG2_E)
    if given.slopes is not None:
        final += alibi_bias(given.slopes[head] * LOG2_E, rows, keys)
    seen = None
    if masked:
        seen = visible(spec, rows, keys)
        if tiles.kv_padded > spec.kv_len:
            real = keys.index < spec.kv_len
            seen = real if seen is None else seen & real
        final = jnp.where(seen, final, -jnp.inf)
    return Scores(final, tanh, seen, rows, keys)


def _side(spec: AttentionSpec, block: Any, size: int, axis: int, first: int, marks: Any) -> Rows:
    """Indices and marks of a block as [size, 1] (axis 0) or [1, size] (axis 1)."""
    shape = (size, 1) if axis == 0 else (1, size)
    index = lax.broadcasted_iota(jnp.int32, shape, axis) + block * size
    count = 0 if marks is None else marks.shape[axis ^ 1]
    columns = [marks[:, n : n + 1] if axis == 0 else marks[n : n + 1, :] for n in range(count)]
    position = columns.pop(0) if spec.positions else index + first
    segment = columns.pop(0) if spec.segments else None
    return Rows(index, position, segment, *columns)


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts one axis of each, in b's dtype, with float32 sums."""
    return lax.dot_general(
        a.astype(b.dtype),
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision(b.dtype),
        preferred_element_type=jnp.float32,
    )


def used(x: Float[Array, "inner D"], weights: Float[Array, "outer inner"]) -> Array:
    """x with 0 in the rows that have no weight: what nobody sees may be NaN, and 0 · NaN is NaN."""
    most = jnp.broadcast_to(weights.max(0, keepdims=True), (LANES, weights.shape[1]))
    return jnp.where(to_columns(most)[:, :1] > 0, x.astype(jnp.float32), 0.0).astype(x.dtype)


def may_hold_unseen(spec: AttentionSpec) -> bool:
    """Whether there can be keys that no query sees, or queries that see no key: their content must not matter."""
    return spec.segments or spec.positions or spec.ranges or spec.q_len != spec.kv_len


def to_columns(x: Float[Array, "128 n"]) -> Float[Array, "n 128"]:
    """Values along the lanes to values along the sublanes, repeated in all lanes."""
    return jnp.transpose(x)


def repeated(row: Float[Array, "1 n"]) -> Float[Array, "n 128"]:
    """A row as a column that is repeated in all lanes."""
    return to_columns(jnp.broadcast_to(row, (LANES, row.shape[1])))


def widened(x: Float[Array, "n 128"], width: int) -> Float[Array, "n width"]:
    """A column that is repeated in all lanes, repeated in `width` lanes."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def by_heads(x: Float[Array, "B L N D"], padded: int) -> Float[Array, "B N padded D"]:
    """Heads before the length, as the kernels take them; padding is 0."""
    return jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def rows_by_heads(x: Float[Array, "B T N"], padded: int) -> Float[Array, "B N 1 padded"]:
    """A number per query and head, with the queries in the lanes; padding is 0."""
    return jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, 0))).swapaxes(1, 2)[:, :, None]


def result(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """Of a kernel's output, varying over the mesh axes of `like`."""
    axes = jax.sharding.ManualAxisType(varying=manual_axes.axes_of(like))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def finite_base_2(lse: Float[Array, "1 n"]) -> Float[Array, "1 n"]:
    """The log-sum-exp for powers of 2; 0 for a row that sees nothing, whose scores are -inf."""
    return jnp.where(lse == -jnp.inf, 0.0, lse) * LOG2_E
