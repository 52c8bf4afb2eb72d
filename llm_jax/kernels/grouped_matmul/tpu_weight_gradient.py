"""Sums over the rows of each group: grid (tiles of the weights in two dimensions, visits)."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.grouped_matmul import tpu_rows
from llm_jax.kernels.grouped_matmul.tpu import Tiles
from llm_jax.kernels.grouped_matmul.visits import visits

WIDER = 4
"""How many times as many columns of x as of g a tile has of rows that are copied one by one: so many fewer copies."""


def sums_of_groups(
    x: Float[Array, "T K"],
    g: Float[Array, "M N"],
    group_sizes: Int[Array, " E"],
    tiles: Tiles,
    rows: Int[Array, " M"] | None,
) -> Float[Array, "E K N"]:
    """Per group the sum over its rows of x ⊗ g, 0 of an empty one; row m is x[m], or x[rows[m]]."""
    height, k, n = g.shape[0], x.shape[1], g.shape[1]
    m, b = min(height, tiles.rows), mosaic_tpu.even(n, tiles.made)
    if rows is None:
        parts, a = 1, mosaic_tpu.even(k, tiles.made)
    else:
        parts = tpu_rows.parts_of(x.dtype)
        a = mosaic_tpu.even(-(-k // (128 * parts)) * 128, WIDER * tiles.made // parts)
    down = pl.cdiv(k, parts * a)
    plan = visits(group_sizes, height, m, align=m, behind=False, empty=True)

    def first_row(i: Any, j: Any, v: Any, count: Any, group: Any, first: Any, *bounds: Any) -> Any:
        return first[v]

    def of_x(i: Any, j: Any, v: Any, count: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, i

    def of_g(i: Any, j: Any, v: Any, count: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, j

    def of_sums(i: Any, j: Any, v: Any, count: Any, group: Any, *rest: Any) -> tuple[Any, ...]:
        return group[v], 0, i, j

    if rows is None:
        sources, specs, scratch = [x], [pl.BlockSpec((m, a), of_x)], []
    else:
        taken = tpu_rows.Taken.of(rows, m)
        sources = [taken.rows, taken.rows, tpu_rows.words(x, down * a)]
        specs, scratch = taken.specs(first_row), taken.scratch(a)
    # Of whole parts: only a tile at the end of the last may reach over it.
    made = k if parts == 1 else down * a
    call = pl.pallas_call(
        functools.partial(_kernel, m=m, taken=rows is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(down, pl.cdiv(n, b), plan.count),
            in_specs=[*specs, pl.BlockSpec((m, b), of_g)],
            out_specs=pl.BlockSpec((None, parts, a, b), of_sums),
            scratch_shapes=[pltpu.VMEM((parts, a, b), jnp.float32), *scratch],
        ),
        out_shape=manual_axes.like(x, (group_sizes.shape[0], parts, made, n), x.dtype),
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary"),
        name="llm_jax_grouped_matmul_weight_gradient",
    )
    sums = call(plan.count[None], plan.group, plan.first, plan.begin, plan.end, *sources, g)
    return sums.reshape(group_sizes.shape[0], parts * made, n)[:, :k]


def _kernel(
    count_ref: Any,
    group_ref: Any,
    first_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    *refs: Any,
    m: int,
    taken: bool,
) -> None:
    buffers: Any
    refs, (buffers, semaphores) = (refs[:-2], refs[-2:]) if taken else (refs, (None, None))
    *x_refs, g_ref, out_ref, total_ref = refs
    v = pl.program_id(2)
    group, first = group_ref[v], first_ref[v]
    begin, end = begin_ref[group], end_ref[group]
    whole = (begin <= first) & (first + m <= end)
    tile = lax.div(first, m)

    if taken:
        last = lax.div(first_ref[count_ref[0] - 1], m)
        a = total_ref.shape[1]

        @pl.when((v == 0) | (lax.div(first_ref[jnp.maximum(v - 1, 0)], m) != tile))
        def _():
            columns = pl.ds(pl.multiple_of(pl.program_id(0) * a, 128), a)
            tpu_rows.bring(x_refs, buffers, semaphores, tile, last, columns)

    def add(keep: Callable[[Array], Array]) -> None:
        parts = tpu_rows.numbers(buffers[lax.rem(tile, 2)], g_ref.dtype) if taken else [x_refs[0][...]]
        g = keep(g_ref[...])
        for part, x in enumerate(parts):
            total_ref[part] += mosaic_tpu.dot(keep(x), g, 0, 0)

    @pl.when((v == 0) | (group_ref[jnp.maximum(v - 1, 0)] != group))
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    # Only a tile at an edge of the group has rows of others, and they may hold NaN: masked in both operands.
    pl.when(whole)(lambda: add(lambda x: x))
    own = functools.partial(mosaic_tpu.keep, axis=0, start=first, begin=begin, end=end)
    pl.when(~whole & (end > begin))(lambda: add(own))

    ends = v == count_ref[0] - 1
    following = group_ref[jnp.where(ends, v, v + 1)]

    @pl.when(ends | (following != group))
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)
