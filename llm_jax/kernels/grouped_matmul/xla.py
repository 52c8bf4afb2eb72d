"""Blocks of rows, each times the weights of one group: on a CPU, where `jax.lax.ragged_dot` multiplies every row with
every group's weights. Elsewhere `ragged_dot`, which XLA turns into grouped products.

A block that reaches past the end of its group gives wrong rows there, which the next group, coming later, writes over.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.platform import target_platform

MOST_ROWS = 128
"""Of a block. Larger ones waste more at the ends of groups, smaller ones read the weights more often."""


def supports(spec: GroupedSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def product(
    spec: GroupedSpec, x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """Rows of x times the weights of their group, 0 behind the last group."""
    return _rows_times(spec, x, w, group_sizes, contracted=1)


def input_gradient(
    spec: GroupedSpec, g: Float[Array, "M N"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M K"]:
    """Rows of g times the transposed weights of their group."""
    return _rows_times(spec, g, w, group_sizes, contracted=2)


def weight_gradient(
    spec: GroupedSpec, x: Float[Array, "M K"], g: Float[Array, "M N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "E K N"]:
    """Per group the sum over its rows of x ⊗ g, 0 of an empty one."""
    if target_platform() != "cpu":
        numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        return lax.ragged_dot_general(x, g, group_sizes, numbers, precision=_precision(x))
    size = _block(spec)
    ends = jnp.cumsum(group_sizes)
    x, g = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x, g))

    def of_group(e: Array, out: Array) -> Array:
        def add(i: Array, total: Array) -> Array:
            at = ends[e] - group_sizes[e] + i * size
            own = (at + jnp.arange(size) < ends[e])[:, None]
            x_block, g_block = (jnp.where(own, lax.dynamic_slice_in_dim(rows, at, size), 0) for rows in (x, g))
            return total + _dot(x_block, g_block, 0, 0).astype(jnp.float32)

        empty = manual_axes.full((spec.inputs, spec.outputs), 0.0, (x, g))
        total = lax.fori_loop(0, (group_sizes[e] + size - 1) // size, add, empty)
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), e, 0)

    out = manual_axes.full((spec.groups, spec.inputs, spec.outputs), 0, (x, g), x.dtype)
    return _over_groups(group_sizes, of_group, out)


def _rows_times(spec: GroupedSpec, rows: Array, w: Array, group_sizes: Array, contracted: int) -> Array:
    if target_platform() != "cpu":
        w = w if contracted == 1 else jnp.swapaxes(w, 1, 2)
        return lax.ragged_dot(rows, w, group_sizes, precision=_precision(rows))
    size = _block(spec)
    ends = jnp.cumsum(group_sizes)
    rows = jnp.pad(rows, ((0, size), (0, 0)))

    def of_group(e: Array, out: Array) -> Array:
        weights = w[e]

        def block(i: Array, out: Array) -> Array:
            at = ends[e] - group_sizes[e] + i * size
            made = _dot(lax.dynamic_slice_in_dim(rows, at, size), weights, 1, contracted - 1)
            made = jnp.where((at + jnp.arange(size) < ends[-1])[:, None], made, 0)
            return lax.dynamic_update_slice_in_dim(out, made, at, 0)

        return lax.fori_loop(0, (group_sizes[e] + size - 1) // size, block, out)

    out = manual_axes.full((spec.rows + size, w.shape[3 - contracted]), 0, (rows, w), rows.dtype)
    return _over_groups(group_sizes, of_group, out)[: spec.rows]


def _over_groups(group_sizes: Array, of_group: Callable[[Array, Array], Array], out: Array) -> Array:
    """`of_group` for one group after another, but for the empty ones, whose weights are not even read."""

    def step(e: Array, out: Array) -> Array:
        return lax.cond(group_sizes[e] > 0, partial(of_group, e), lambda out: out, out)

    return lax.fori_loop(0, group_sizes.shape[0], step, out)


def _block(spec: GroupedSpec) -> int:
    """Rows of a block: a power of two, a quarter of a group's share at most."""
    share = max(1, spec.rows // (4 * spec.groups))
    return min(MOST_ROWS, 1 << (share.bit_length() - 1))


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=_precision(a))


def _precision(x: Array) -> lax.Precision:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
