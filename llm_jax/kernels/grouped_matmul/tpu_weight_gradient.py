"""Sums over the rows of each group: grid (tiles of the weights in two dimensions, visits)."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.grouped_matmul.tpu import Tiles
from llm_jax.kernels.grouped_matmul.visits import visits


def sums_of_groups(
    x: Float[Array, "M K"], g: Float[Array, "M N"], group_sizes: Int[Array, " E"], tiles: Tiles
) -> Float[Array, "E K N"]:
    """Per group the sum over its rows of x ⊗ g, 0 of an empty one."""
    m, a, b = min(x.shape[0], tiles.rows), *(mosaic_tpu.even(size, tiles.made) for size in (x.shape[1], g.shape[1]))
    plan = visits(group_sizes, x.shape[0], m, align=m, behind=False, empty=True)

    def of_x(i: Any, j: Any, v: Any, count: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, i

    def of_g(i: Any, j: Any, v: Any, count: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, j

    def of_sums(i: Any, j: Any, v: Any, count: Any, group: Any, *rest: Any) -> tuple[Any, ...]:
        return group[v], i, j

    call = pl.pallas_call(
        functools.partial(_kernel, m=m),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(x.shape[1], a), pl.cdiv(g.shape[1], b), plan.count),
            in_specs=[pl.BlockSpec((m, a), of_x), pl.BlockSpec((m, b), of_g)],
            out_specs=pl.BlockSpec((None, a, b), of_sums),
            scratch_shapes=[pltpu.VMEM((a, b), jnp.float32)],
        ),
        out_shape=manual_axes.like(x, (group_sizes.shape[0], x.shape[1], g.shape[1]), x.dtype),
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary"),
        name="llm_jax_grouped_matmul_weight_gradient",
    )
    return call(plan.count[None], plan.group, plan.first, plan.begin, plan.end, x, g)


def _kernel(
    count_ref: Any,
    group_ref: Any,
    first_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    x_ref: Any,
    g_ref: Any,
    out_ref: Any,
    total_ref: Any,
    *,
    m: int,
) -> None:
    v = pl.program_id(2)
    group, first = group_ref[v], first_ref[v]
    begin, end = begin_ref[group], end_ref[group]
    whole = (begin <= first) & (first + m <= end)

    @pl.when((v == 0) | (group_ref[jnp.maximum(v - 1, 0)] != group))
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(whole)
    def _():
        total_ref[...] += mosaic_tpu.dot(x_ref[...], g_ref[...], 0, 0)

    # Only a tile at an edge of the group has rows of others, and they may hold NaN: masked in both operands.
    @pl.when(~whole & (end > begin))
    def _():
        keep = functools.partial(mosaic_tpu.keep, axis=0, start=first, begin=begin, end=end)
        total_ref[...] += mosaic_tpu.dot(keep(x_ref[...]), keep(g_ref[...]), 0, 0)

    last = v == count_ref[0] - 1
    following = group_ref[jnp.where(last, v, v + 1)]

    @pl.when(last | (following != group))
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)
