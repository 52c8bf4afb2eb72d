"""Blocks of rows, each times the weights of one group: on a CPU, where `jax.lax.ragged_dot` multiplies every row with
every group's weights. Elsewhere `ragged_dot`, which XLA turns into grouped products.

Rows that are taken from tokens are taken block by block in the one case, and all at once in the other.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.platform import target_platform

# A product reorders its weights before it begins, which takes the time of some 200 rows: so a group is one block, if it
# is not much larger than its share, and only the rest of a larger one, or a small group, takes a smaller block.
LARGEST, HALVINGS = 1.0625, 3


def supports(spec: GroupedSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def product(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "M N"]:
    """Rows of x, or those that `rows` takes from it, times the weights of their group, 0 behind the last group."""
    return _rows_times(spec, x, w, group_sizes, rows, axis=0)


def input_gradient(
    spec: GroupedSpec, g: Float[Array, "M N"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M K"]:
    """Rows of g times the transposed weights of their group."""
    return _rows_times(spec, g, w, group_sizes, None, axis=1)


def weight_gradient(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    g: Float[Array, "M N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "E K N"]:
    """Per group the sum over its rows of x ⊗ g, 0 of an empty one."""
    if target_platform() != "cpu":
        x = x if rows is None else x[rows]
        numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        return lax.ragged_dot_general(x, g, group_sizes, numbers, precision=_precision(x))

    def of_group(e: Array, begin: Array, end: Array, out: Array) -> Array:
        def add(size: int, at: Array, total: Array) -> Array:
            x_block, g_block = _block(x, at, size, rows), _block(g, at, size)
            own = _own(spec, at, size, end)
            made = dot(jnp.where(own, x_block, 0), jnp.where(own, g_block, 0), 0, 0)
            return total + made.astype(jnp.float32)

        empty = manual_axes.full((spec.inputs, spec.outputs), 0.0, (x, g))
        total = _over_blocks(spec, begin, end, add, empty)
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), e, 0)

    out = manual_axes.full((spec.groups, spec.inputs, spec.outputs), 0, (x, g), x.dtype)
    return _over_groups(group_sizes, of_group, out)


def _rows_times(spec: GroupedSpec, x: Array, w: Array, group_sizes: Array, rows: Array | None, axis: int) -> Array:
    if target_platform() != "cpu":
        x = x if rows is None else x[rows]
        w = w if axis == 0 else jnp.swapaxes(w, 1, 2)
        return lax.ragged_dot(x, w, group_sizes, precision=_precision(x))
    return of_blocks(spec, [x], [w], group_sizes, w.shape[2 - axis], lambda x, w: dot(x, w, 1, axis), rows)


def of_blocks(
    spec: GroupedSpec,
    sources: Sequence[Array],
    weights: Sequence[Array],
    group_sizes: Array,
    made: int,
    make: Callable[..., Array],
    rows: Array | None = None,
) -> Float[Array, "M made"]:
    """`make(*blocks of rows, *weights of their group)`, `made` wide, for one block after another; 0 behind the last
    group. The rows are those of the sources, or what `rows` takes from them."""

    def of_group(e: Array, begin: Array, end: Array, out: Array) -> Array:
        of_their_group = [w[e] for w in weights]

        def write(size: int, at: Array, out: Array) -> Array:
            new = make(*(_block(x, at, size, rows) for x in sources), *of_their_group)
            new = jnp.where(_own(spec, at, size, end), new, _block(out, at, size))
            return lax.dynamic_update_slice_in_dim(out, new, at, 0)

        return _over_blocks(spec, begin, end, write, out)

    out = manual_axes.full((spec.rows, made), 0, (sources, weights), sources[0].dtype)
    return _over_groups(group_sizes, of_group, out)


def _over_groups(group_sizes: Array, of_group: Callable[[Array, Array, Array, Array], Array], out: Array) -> Array:
    """`of_group(e, first row, row behind, out)` for one group after another, but for the empty ones, whose weights are
    not even read."""
    ends = jnp.cumsum(group_sizes)

    def step(e: Array, out: Array) -> Array:
        present = partial(of_group, e, ends[e] - group_sizes[e], ends[e])
        return lax.cond(group_sizes[e] > 0, present, lambda out: out, out)

    return lax.fori_loop(0, group_sizes.shape[0], step, out)


def _over_blocks(spec: GroupedSpec, begin: Array, end: Array, run: Callable[[int, Array, Any], Any], carry: Any) -> Any:
    """`run(rows, first row, carry)` for blocks that cover a group: large ones, and last the smallest that will do."""
    largest = min(spec.rows, math.ceil(LARGEST * spec.rows / spec.groups))
    sizes = sorted({math.ceil(largest / 2**i) for i in range(HALVINGS + 1)})
    whole = (end - begin - 1) // largest
    carry = lax.fori_loop(0, whole, lambda i, carry: run(largest, begin + i * largest, carry), carry)
    at = begin + whole * largest
    which = jnp.sum(end - at > jnp.array(sizes))
    return lax.switch(which, [partial(run, size, at) for size in sizes], carry)


# A block that would reach over the last row begins earlier, with rows that are not its own: `lax.dynamic_slice` and
# `dynamic_update_slice` see to it, and `_own` to those rows.
def _block(x: Array, at: Array, size: int, rows: Array | None = None) -> Array:
    if rows is None:
        return lax.dynamic_slice_in_dim(x, at, size)
    return x.at[lax.dynamic_slice_in_dim(rows, at, size)].get(mode="promise_in_bounds")


def _own(spec: GroupedSpec, at: Array, size: int, end: Array) -> Bool[Array, "m 1"]:
    rows = jnp.minimum(at, spec.rows - size) + jnp.arange(size)
    return ((rows >= at) & (rows < end))[:, None]


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Product of two matrices, summed over one axis of each, in their dtype."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=_precision(a))


def _precision(x: Array) -> lax.Precision:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
