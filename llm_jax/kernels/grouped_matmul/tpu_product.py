"""Rows times the weights of their group: grid (tiles of what is made, visits, tiles of what is summed over)."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.grouped_matmul.tpu import Tiles
from llm_jax.kernels.grouped_matmul.visits import visits


def rows_times(
    rows: Float[Array, "M A"], w: Array, group_sizes: Int[Array, " E"], tiles: Tiles, *, transposed: bool
) -> Float[Array, "M B"]:
    """rows[m] @ w[e] with w [E, A, B], or [E, B, A] if `transposed`; 0 behind the last group."""
    groups, summed, made = w.shape[0], *(w.shape[:0:-1] if transposed else w.shape[1:])
    m, a, b = min(rows.shape[0], tiles.rows), mosaic_tpu.even(summed, tiles.summed), mosaic_tpu.even(made, tiles.made)
    plan = visits(group_sizes, rows.shape[0], m, align=m, behind=True)

    def of_rows(j: Any, v: Any, i: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, i

    def of_weights(j: Any, v: Any, i: Any, group: Any, *rest: Any) -> tuple[Any, ...]:
        # The rows behind the last group have no weights; those of the last one are there, unread.
        e = jnp.minimum(group[v], groups - 1)
        return (e, j, i) if transposed else (e, i, j)

    def of_products(j: Any, v: Any, i: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, j

    kernel = functools.partial(_kernel, groups=groups, summed=summed, a=a, transposed=transposed)
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(made, b), plan.count, pl.cdiv(summed, a)),
            in_specs=[
                pl.BlockSpec((m, a), of_rows),
                pl.BlockSpec((None, b, a) if transposed else (None, a, b), of_weights),
            ],
            out_specs=pl.BlockSpec((m, b), of_products),
            scratch_shapes=[pltpu.VMEM((m, b), jnp.float32)],
        ),
        out_shape=manual_axes.like(rows, (rows.shape[0], made), rows.dtype),
        compiler_params=mosaic_tpu.params("parallel", "arbitrary", "arbitrary"),
        name="llm_jax_grouped_matmul_input_gradient" if transposed else "llm_jax_grouped_matmul",
    )
    return call(plan.group, plan.first, plan.begin, plan.end, rows, w)


def _kernel(
    group_ref: Any,
    first_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    rows_ref: Any,
    w_ref: Any,
    out_ref: Any,
    total_ref: Any,
    *,
    groups: int,
    summed: int,
    a: int,
    transposed: bool,
) -> None:
    v, i = pl.program_id(1), pl.program_id(2)
    group = group_ref[v]

    @pl.when(i == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(group < groups)
    def _():
        rows, weights = rows_ref[...], w_ref[...]
        if summed % a:  # What lies behind the last column is not 0, and may be NaN.
            rows = mosaic_tpu.keep(rows, axis=1, start=i * a, begin=0, end=summed)
            weights = mosaic_tpu.keep(weights, axis=int(transposed), start=i * a, begin=0, end=summed)
        total_ref[...] += mosaic_tpu.dot(rows, weights, 1, int(transposed))

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        # Groups that share a tile visit it one after another: each writes its own rows.
        row = first_ref[v] + lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
        own = (row >= begin_ref[group]) & (row < end_ref[group])
        out_ref[...] = jnp.where(own, total_ref[...], out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)
