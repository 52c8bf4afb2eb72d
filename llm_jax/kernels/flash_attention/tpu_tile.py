"""One tile of scores in a TPU kernel, and statistics of its rows.

A number per row is kept as a column that is repeated in all lanes: arithmetic with the tile then moves nothing.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from llm_jax.kernels import mosaic_tpu
from llm_jax.kernels.flash_attention.bounds import Tiling
from llm_jax.kernels.flash_attention.spec import AttentionSpec, Rows, alibi_bias, first_position, visible
from llm_jax.kernels.flash_attention.tpu_blocks import Blocks, Extras
from llm_jax.kernels.flash_attention.tpu_schedule import MASKED, UNMASKED, inner, outer

LANES = 128
LOG2_E = math.log2(math.e)
"""Exponentials are powers of 2, as the hardware has them: scores are multiplied by this."""


class Scores(NamedTuple):
    """Of a tile, queries by keys or (`by_keys`) keys by queries."""

    final: Float[Array, "outer inner"]
    """In base 2; -inf where not visible."""
    tanh: Float[Array, "outer inner"] | None
    """Where there is a soft cap."""
    rows: Rows
    keys: Rows


def on_tile(blocks: Blocks, step: Any, body: Any) -> None:
    """Runs `body(masked)` unless there is nothing to do in this step; without the mask where all is visible."""
    if _may_mask(blocks.spec, blocks.tiles):
        pl.when(step & MASKED != 0)(lambda: body(True))
    pl.when(step & UNMASKED != 0)(lambda: body(False))


def _may_mask(spec: AttentionSpec, tiles: Tiling) -> bool:
    data = spec.segments or spec.ranges
    return data or spec.causal or bool(spec.window or spec.chunk) or tiles.kv_padded > spec.kv_len


def tile_scores(
    blocks: Blocks, q: Float[Array, "q H"], k: Float[Array, "kv H"], given: Extras, head: Any, step: Any, masked: bool
) -> Scores:
    """Scores of query head `head` in the two blocks of `step`; `given` holds references to the marks' blocks."""
    spec, tiles = blocks.spec, blocks.tiles
    q_axis, kv_axis = (1, 0) if blocks.by_keys else (0, 1)
    at = (inner(step), outer(step)) if blocks.by_keys else (outer(step), inner(step))
    rows = _side(spec, at[0], tiles.q_block, q_axis, first_position(spec), given.q_marks)
    keys = _side(spec, at[1], tiles.kv_block, kv_axis, 0, given.kv_marks)
    raw = mosaic_tpu.dot(k, q, 1, 1) if blocks.by_keys else mosaic_tpu.dot(q, k, 1, 1)
    tanh = None
    if spec.softcap is None:
        final = raw * (spec.scale * LOG2_E)
    else:
        tanh = jnp.tanh(raw * (spec.scale / spec.softcap))
        final = tanh * (spec.softcap * LOG2_E)
    if given.slopes is not None:
        final += alibi_bias(given.slopes[head] * LOG2_E, rows, keys)
    seen = visible(spec, rows, keys) if masked else None
    if masked and tiles.kv_padded > spec.kv_len:
        real = keys.index < spec.kv_len
        seen = real if seen is None else seen & real
    if seen is not None:
        final = jnp.where(seen, final, -jnp.inf)
    return Scores(final, tanh, rows, keys)


def _side(spec: AttentionSpec, block: Any, size: int, axis: int, first: int, marks: Any) -> Rows:
    """Indices and marks of a block as [size, 1] (axis 0) or [1, size] (axis 1)."""
    index = lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis) + block * size
    given = []
    if marks is not None:
        given = [marks[:, n : n + 1] if axis == 0 else marks[n : n + 1, :] for n in range(marks.shape[1 - axis])]
    position = given.pop(0) if spec.positions else index + first
    segment = given.pop(0) if spec.segments else None
    return Rows(index, position, segment, *given)


def column(row: Float[Array, "1 n"]) -> Float[Array, "n 128"]:
    """Values along the lanes to values along the sublanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def row(column: Float[Array, "n 128"]) -> Float[Array, "1 n"]:
    """Values along the sublanes to values along the lanes."""
    return jnp.transpose(column)[:1]


def widened(column: Float[Array, "n 128"], width: int) -> Float[Array, "n width"]:
    """Repeated in `width` lanes."""
    return jnp.tile(column, (1, pl.cdiv(width, LANES)))[:, :width]
