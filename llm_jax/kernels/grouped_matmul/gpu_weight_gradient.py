"""Sums over the rows of each group: steps of 64 rows, of which only those at an edge of a group are masked."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels import mosaic_gpu
from llm_jax.kernels.grouped_matmul.gpu import Tiles
from llm_jax.kernels.grouped_matmul.gpu_rows import TakenProduct
from llm_jax.kernels.mosaic_gpu import DEPTH, ROWS, WARPGROUP, WARPGROUPS

HEIGHT = WARPGROUPS * ROWS
STORED = 64
"""Columns that are stored at a time."""


def sums_of_groups(
    x: Float[Array, "T K"],
    g: Float[Array, "M N"],
    group_sizes: Int[Array, " E"],
    tiles: Tiles,
    rows: Int[Array, " M"] | None,
) -> Float[Array, "E K N"]:
    """Per group the sum over its rows of x ⊗ g, 0 of an empty one; row m is x[m], or x[rows[m]]."""
    groups, k, n = group_sizes.shape[0], x.shape[1], g.shape[1]
    ends = jnp.minimum(jnp.cumsum(jnp.clip(group_sizes, 0, g.shape[0]).astype(jnp.int32)), g.shape[0])
    x, g = mosaic_gpu.padded(x, (DEPTH if rows is None else 1, HEIGHT)), mosaic_gpu.padded(g, (DEPTH, tiles.width))
    rows = None if rows is None else mosaic_gpu.padded(rows, (DEPTH,))
    shape = groups, x.shape[1], g.shape[1]
    kernel = mosaic_gpu.launch(
        functools.partial(_kernel, tiles=tiles),
        jax.ShapeDtypeStruct(shape, x.dtype),
        tiles=groups * (shape[1] // HEIGHT) * (shape[2] // tiles.width),
        name="llm_jax_grouped_matmul_weight_gradient",
    )
    return kernel(jnp.concatenate([jnp.zeros_like(ends[:1]), ends]), rows, x, g)[:, :k, :n]


def _kernel(bounds_ref: Any, rows_ref: Any, x_ref: Any, g_ref: Any, out_ref: Any, *, tiles: Tiles) -> None:
    groups, down, across = out_ref.shape[0], out_ref.shape[1] // HEIGHT, out_ref.shape[2] // tiles.width

    def product(first: Any, steps: Any, i: Any, j: Any, multiply: Any) -> mosaic_gpu.Product:
        kind = mosaic_gpu.Product if rows_ref is None else functools.partial(TakenProduct, rows=rows_ref)
        return kind(
            operands=(
                mosaic_gpu.Operand((DEPTH, HEIGHT), lambda s: (first + s, i)),
                mosaic_gpu.Operand((DEPTH, tiles.width), lambda s: (first + s, j)),
            ),
            width=tiles.width,
            steps=steps,
            stages=tiles.stages,
            multiply=multiply,
        )

    def scope(pipeline: Any, stored: Any, both: Any) -> None:
        @plgpu.nd_loop((groups, down * across), collective_axes=mosaic_gpu.BLOCKS)
        def _(loop: Any) -> None:
            group = loop.index[0]
            i, j = plgpu.planar_snake(loop.index[1], (down, across), 0, tiles.band)
            begin, end = bounds_ref[group], bounds_ref[group + 1]
            first = lax.div(begin, DEPTH)
            steps = jnp.where(end > begin, lax.div(end + (DEPTH - 1), DEPTH) - first, 0)

            def multiply(step: Any, acc: Any, x: Any, g: Any) -> None:
                at = (first + step) * DEPTH
                wg = lax.axis_index(WARPGROUP)
                share = tiles.width // WARPGROUPS
                piece = min(share, 64)
                pieces = [g.at[:, pl.ds(wg * share + c, piece)] for c in range(0, share, piece)]

                @pl.when((at < begin) | (at + DEPTH > end))
                def _():
                    # Rows of other groups may hold NaN, so both operands are masked: x by the warpgroup that reads it,
                    # g, which both read, by halves.
                    for part in (x.at[:, mosaic_gpu.half()], *pieces):
                        row = at + plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
                        value = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
                        part[...] = jnp.where((row >= begin) & (row < end), value, jnp.zeros_like(value))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive_and_wait(both)

                plgpu.wgmma(acc, x.at[:, mosaic_gpu.half()].T, g)

            def store(tile: Array) -> None:
                wg = lax.axis_index(WARPGROUP)
                rows = pl.ds(i * HEIGHT + wg * ROWS, ROWS)
                for part, column in enumerate(range(0, tiles.width, STORED)):
                    to = out_ref.at[group, rows, pl.ds(j * tiles.width + column, STORED)]
                    mosaic_gpu.store(to, stored.at[wg], tile[:, column : column + STORED], part)

            product(first, steps, i, j, multiply).run(x_ref, g_ref, allocations=pipeline, finish=store)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(
        scope,
        pipeline=product(0, tiles.stages, 0, 0, lambda *_: None).allocations(x_ref, g_ref),
        stored=mosaic_gpu.matrices((WARPGROUPS, 2, ROWS, STORED), out_ref.dtype),
        both=plgpu.Barrier(num_arrivals=WARPGROUPS),
        collective_axes=WARPGROUP,
    )
