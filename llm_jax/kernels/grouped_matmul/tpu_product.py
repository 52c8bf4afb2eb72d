"""Rows times the weights of their group: grid (tiles of what is made, visits, tiles of what is summed over)."""

import functools
from collections.abc import Callable, Sequence
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
    rows: Sequence[Float[Array, "M A"]],
    weights: Sequence[Array],
    group_sizes: Int[Array, " E"],
    tiles: Tiles,
    *,
    transposed: bool,
    name: str,
    join: Callable[..., Array] | None = None,
) -> Float[Array, "M B"]:
    """rows[m] @ w[e] with w [E, A, B], or [E, B, A] if `transposed`; 0 behind the last group.

    Of several rows, each with its weights, the sum in float32. Of one with several weights, what `join` makes of the
    products, number by number in float32.
    """
    x, w = rows[0], weights[0]
    groups, summed, made = w.shape[0], *(w.shape[:0:-1] if transposed else w.shape[1:])
    m, a, b = min(x.shape[0], tiles.rows), mosaic_tpu.even(summed, tiles.summed), mosaic_tpu.even(made, tiles.made)
    plan = visits(group_sizes, x.shape[0], m, align=m, behind=True)

    def of_rows(j: Any, v: Any, i: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, i

    def of_weights(j: Any, v: Any, i: Any, group: Any, *rest: Any) -> tuple[Any, ...]:
        # The rows behind the last group have no weights; those of the last one are there, unread.
        e = jnp.minimum(group[v], groups - 1)
        return (e, j, i) if transposed else (e, i, j)

    def of_products(j: Any, v: Any, i: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, j

    row_spec = pl.BlockSpec((m, a), of_rows)
    weight_spec = pl.BlockSpec((None, b, a) if transposed else (None, a, b), of_weights)
    kernel = functools.partial(
        _kernel,
        groups=groups,
        summed=summed,
        a=a,
        transposed=transposed,
        sides=(len(rows), len(weights)),
        join=join,
    )
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(made, b), plan.count, pl.cdiv(summed, a)),
            in_specs=[row_spec] * len(rows) + [weight_spec] * len(weights),
            out_specs=pl.BlockSpec((m, b), of_products),
            scratch_shapes=[pltpu.VMEM((m, b), jnp.float32)] * (1 if join is None else len(weights)),
        ),
        out_shape=manual_axes.like(x, (x.shape[0], made), x.dtype),
        compiler_params=mosaic_tpu.params("parallel", "arbitrary", "arbitrary"),
        name=name,
    )
    return call(plan.group, plan.first, plan.begin, plan.end, *rows, *weights)


def _kernel(
    group_ref: Any,
    first_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    *refs: Any,
    groups: int,
    summed: int,
    a: int,
    transposed: bool,
    sides: tuple[int, int],
    join: Callable[..., Array] | None,
) -> None:
    v, i = pl.program_id(1), pl.program_id(2)
    group = group_ref[v]
    row_refs, weight_refs, (out_ref, *total_refs) = refs[: sides[0]], refs[sides[0] : sum(sides)], refs[sum(sides) :]

    @pl.when(i == 0)
    def _():
        for total_ref in total_refs:
            total_ref[...] = jnp.zeros_like(total_ref)

    def whole(x: Array, axis: int) -> Array:
        # What lies behind the last column is not 0, and may be NaN.
        return mosaic_tpu.keep(x, axis=axis, start=i * a, begin=0, end=summed) if summed % a else x

    @pl.when(group < groups)
    def _():
        rows = [whole(ref[...], 1) for ref in row_refs]
        for n, ref in enumerate(weight_refs):
            product = mosaic_tpu.dot(rows[min(n, sides[0] - 1)], whole(ref[...], int(transposed)), 1, int(transposed))
            total_refs[min(n, len(total_refs) - 1)][...] += product

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        totals = [ref[...] for ref in total_refs]
        made = totals[0] if join is None else join(*totals)
        # Groups that share a tile visit it one after another: each writes its own rows.
        row = first_ref[v] + lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
        own = (row >= begin_ref[group]) & (row < end_ref[group])
        out_ref[...] = jnp.where(own, made, out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)
