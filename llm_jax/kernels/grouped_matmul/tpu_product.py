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
from llm_jax.kernels.grouped_matmul import tpu_rows
from llm_jax.kernels.grouped_matmul.tpu import Tiles
from llm_jax.kernels.grouped_matmul.visits import visits


def rows_times(
    sources: Sequence[Float[Array, "M A"]],
    weights: Sequence[Array],
    group_sizes: Int[Array, " E"],
    tiles: Tiles,
    *,
    transposed: bool,
    name: str,
    join: Callable[..., Array] | None = None,
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "M B"]:
    """x[m] @ w[e] with w [E, A, B], or [E, B, A] if `transposed`; 0 behind the last group.

    Of several x, each with its weights, the sum in float32. Of one with several weights, what `join` makes of the
    products, number by number in float32; such a one may have its rows taken from tokens by `rows`.
    """
    x, w = sources[0], weights[0]
    groups, summed, made = w.shape[0], *(w.shape[:0:-1] if transposed else w.shape[1:])
    height, parts = (x.shape[0], 1) if rows is None else (rows.shape[0], tpu_rows.parts_of(x.dtype))
    share = summed if rows is None else -(-summed // (128 * parts)) * 128
    m, a = min(height, tiles.rows), mosaic_tpu.even(share, max(128, tiles.summed // parts))
    b, steps = mosaic_tpu.even(made, tiles.made), pl.cdiv(share, a)
    plan = visits(group_sizes, height, m, align=m, behind=True)

    def first_row(j: Any, v: Any, i: Any, group: Any, first: Any, *bounds: Any) -> Any:
        return first[v]

    def of_rows(*indices: Any) -> tuple[Any, ...]:
        return first_row(*indices) // m, indices[2]

    def of_weights(part: int, j: Any, v: Any, i: Any, group: Any, *rest: Any) -> tuple[Any, ...]:
        # The rows behind the last group have no weights; those of the last one are there, unread. So are those of the
        # last columns, where words have none of the second part.
        e = jnp.minimum(group[v], groups - 1)
        i = i if parts == 1 else jnp.minimum(part * steps + i, pl.cdiv(summed, a) - 1)
        return (e, j, i) if transposed else (e, i, j)

    def of_products(j: Any, v: Any, i: Any, group: Any, first: Any, *bounds: Any) -> tuple[Any, ...]:
        return first[v] // m, j

    if rows is None:
        row_specs, scratch = [pl.BlockSpec((m, a), of_rows)] * len(sources), []
    else:
        taken = tpu_rows.Taken.of(rows, m)
        row_specs, scratch = taken.specs(first_row), taken.scratch(steps * a)
        sources = taken.rows, taken.rows, tpu_rows.words(x, steps * a)
    weight_block = (None, b, a) if transposed else (None, a, b)
    weight_specs = [pl.BlockSpec(weight_block, functools.partial(of_weights, part)) for part in range(parts)]
    weights = [w for w in weights for _ in range(parts)]
    totals = 1 if join is None else len(weights) // parts
    kernel = functools.partial(
        _kernel,
        groups=groups,
        summed=summed,
        a=a,
        share=steps * a,
        transposed=transposed,
        sides=(len(sources), len(weights)),
        totals=totals,
        parts=None if rows is None else parts,
        join=join,
    )
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(made, b), plan.count, steps),
            in_specs=row_specs + weight_specs * (len(weights) // parts),
            out_specs=pl.BlockSpec((m, b), of_products),
            scratch_shapes=[pltpu.VMEM((m, b), jnp.float32)] * totals + scratch,
        ),
        out_shape=manual_axes.like(x, (height, made), x.dtype),
        compiler_params=mosaic_tpu.params("parallel", "arbitrary", "arbitrary"),
        name=name,
    )
    return call(plan.group, plan.first, plan.begin, plan.end, *sources, *weights)


def _kernel(
    group_ref: Any,
    first_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    *refs: Any,
    groups: int,
    summed: int,
    a: int,
    share: int,
    transposed: bool,
    sides: tuple[int, int],
    totals: int,
    parts: int | None,
    join: Callable[..., Array] | None,
) -> None:
    """
    Args:
        share: what a part of the rows sums over, with what is behind the last column.
        parts: of the rows that the kernel takes from tokens; None: rows come as blocks.
    """
    v, i = pl.program_id(1), pl.program_id(2)
    group = group_ref[v]
    row_refs, weight_refs, (out_ref, *scratch) = refs[: sides[0]], refs[sides[0] : sum(sides)], refs[sum(sides) :]
    total_refs = scratch[:totals]
    buffers: Any
    buffers, semaphores = scratch[totals:] if parts else (None, None)
    ragged = summed != share * (parts or 1)

    @pl.when(i == 0)
    def _():
        for total_ref in total_refs:
            total_ref[...] = jnp.zeros_like(total_ref)

    def whole(x: Array, axis: int, part: int = 0) -> Array:
        # What lies behind the last column is not 0, and may be NaN.
        return mosaic_tpu.keep(x, axis=axis, start=part * share + i * a, begin=0, end=summed) if ragged else x

    if parts is not None:
        tile = lax.div(first_ref[v], out_ref.shape[0])
        last = lax.div(first_ref[pl.num_programs(1) - 1], out_ref.shape[0])

        @pl.when((i == 0) & ((v == 0) | (lax.div(first_ref[jnp.maximum(v - 1, 0)], out_ref.shape[0]) != tile)))
        def _():
            tpu_rows.bring(row_refs, buffers, semaphores, tile, last, slice(None))

    def blocks_of_rows() -> list[Array]:
        if parts is None:
            return [whole(ref[...], 1) for ref in row_refs]
        kept = buffers[lax.rem(tile, 2), :, pl.ds(pl.multiple_of(i * a, 128), a)]
        return tpu_rows.numbers(kept, out_ref.dtype)

    @pl.when(group < groups)
    def _():
        blocks = blocks_of_rows()
        for n, ref in enumerate(weight_refs):
            # Each with its rows, or all with the one, or each with all parts of it in turn.
            block = blocks[n % parts if parts else min(n, len(blocks) - 1)]
            of_weights = whole(ref[...], int(transposed), n % parts if parts else 0)
            product = mosaic_tpu.dot(block, of_weights, 1, int(transposed))
            total_refs[min(n // (parts or 1), totals - 1)][...] += product

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        totals = [ref[...] for ref in total_refs]
        made = totals[0] if join is None else join(*totals)
        # Groups that share a tile visit it one after another: each writes its own rows.
        row = first_ref[v] + lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
        own = (row >= begin_ref[group]) & (row < end_ref[group])
        out_ref[...] = jnp.where(own, made, out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)
