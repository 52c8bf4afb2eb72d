"""Rows times the weights of their group: tiles begin with their group, and those at its edges store less."""

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
from llm_jax.kernels.grouped_matmul.visits import visits
from llm_jax.kernels.mosaic_gpu import DEPTH, ROWS, WARPGROUP, WARPGROUPS

HEIGHT = WARPGROUPS * ROWS
ALIGN = 8
"""Rows of a swizzled tile of shared memory: TMA writes whole ones."""
STORED = 32
"""Columns that are stored at a time: what shared memory has room for beside the pipeline."""


def rows_times(
    rows: Float[Array, "M A"], w: Array, group_sizes: Int[Array, " E"], tiles: Tiles, *, transposed: bool
) -> Float[Array, "M B"]:
    """rows[m] @ w[e] with w [E, A, B], or [E, B, A] if `transposed`; 0 behind the last group."""
    m, made = rows.shape[0], w.shape[1 if transposed else 2]
    rows = mosaic_gpu.padded(rows, (ALIGN if m > HEIGHT else HEIGHT, DEPTH))
    w = mosaic_gpu.padded(w, (1, tiles.width, DEPTH) if transposed else (1, DEPTH, tiles.width))
    columns = w.shape[1 if transposed else 2] // tiles.width
    plan = visits(group_sizes, rows.shape[0], HEIGHT, align=ALIGN, behind=False)
    items = mosaic_gpu.in_bands(plan.count, plan.group.shape[0], columns, tiles.band)
    kernel = mosaic_gpu.launch(
        functools.partial(_kernel, tiles=tiles, columns=columns, transposed=transposed),
        jax.ShapeDtypeStruct((rows.shape[0], columns * tiles.width), rows.dtype),
        tiles=items.shape[0],
        name="llm_jax_grouped_matmul_input_gradient" if transposed else "llm_jax_grouped_matmul",
    )
    scalars = plan.count[None] * columns, items, plan.group, plan.first, plan.begin, plan.end
    return kernel(*scalars, rows, w)[:m, :made]


def _kernel(
    count_ref: Any,
    items_ref: Any,
    group_ref: Any,
    first_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    rows_ref: Any,
    w_ref: Any,
    out_ref: Any,
    *,
    tiles: Tiles,
    columns: int,
    transposed: bool,
) -> None:
    def product(column: Any) -> mosaic_gpu.Product:
        def multiply(step: Any, acc: Any, rows: Any, weights: Any) -> None:
            plgpu.wgmma(acc, rows.at[mosaic_gpu.half()], weights.T if transposed else weights)

        return mosaic_gpu.Product(
            a=mosaic_gpu.Operand((HEIGHT, DEPTH), lambda k: (0, k)),
            b=mosaic_gpu.Operand((tiles.width, DEPTH), lambda k: (column, k))
            if transposed
            else mosaic_gpu.Operand((DEPTH, tiles.width), lambda k: (k, column)),
            width=tiles.width,
            steps=rows_ref.shape[1] // DEPTH,
            stages=tiles.stages,
            multiply=multiply,
        )

    def scope(pipeline: Any, whole: Any, some: Any) -> None:
        wg = lax.axis_index(WARPGROUP)

        def place(first: Any, begin: Any, end: Any, column: Any) -> tuple[Any, Any]:
            """Where a tile begins, and how a warpgroup stores its half."""
            # The last tile of all would reach over the last row: it begins earlier, with rows that are not its own.
            start = pl.multiple_of(jnp.minimum(first, rows_ref.shape[0] - HEIGHT), ALIGN)
            at = pl.multiple_of(start + wg * ROWS, ALIGN)
            top = jnp.clip(jnp.maximum(first, begin) - at, 0, ROWS)
            size = jnp.maximum(jnp.clip(end - at, 0, ROWS) - top, 0)
            to = out_ref.at[pl.ds(at, ROWS), pl.ds(column * tiles.width, tiles.width)]
            return start, functools.partial(_store, to, whole.at[wg], some.at[wg], begin=top, size=size)

        @mosaic_gpu.share(count_ref[0])
        def _(i: Any) -> None:
            v, column = lax.div(items_ref[i], columns), lax.rem(items_ref[i], columns)
            group = group_ref[v]
            start, store = place(first_ref[v], begin_ref[group], end_ref[group], column)
            product(column).run(rows_ref.at[pl.ds(start, HEIGHT), :], w_ref.at[group], pipeline, store)

        behind = end_ref[end_ref.shape[0] - 1]
        origin = lax.div(behind, ALIGN) * ALIGN

        @mosaic_gpu.share(lax.div(rows_ref.shape[0] - origin + HEIGHT - 1, HEIGHT) * columns)
        def _(i: Any) -> None:
            v, column = lax.div(i, columns), lax.rem(i, columns)
            _, store = place(origin + v * HEIGHT, behind, rows_ref.shape[0], column)

            @pl.when(wg < WARPGROUPS)
            def _():
                zeros = jnp.zeros((ROWS, tiles.width), jnp.float32)
                store(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(
        scope,
        pipeline=product(0).allocations(rows_ref.at[pl.ds(0, HEIGHT), :], w_ref.at[0]),
        whole=mosaic_gpu.matrices((WARPGROUPS, 2, ROWS, STORED), out_ref.dtype),
        some=plgpu.SMEM((WARPGROUPS, ROWS, STORED), out_ref.dtype),
        collective_axes=WARPGROUP,
    )


def _store(out_ref: Any, whole: Any, some: Any, tile: Array, *, begin: Any, size: Any) -> None:
    """Rows [begin, begin + size) of a warpgroup's half of a tile."""
    for i, column in enumerate(range(0, tile.shape[1], STORED)):
        part, to = tile[:, column : column + STORED], out_ref.at[:, pl.ds(column, STORED)]
        pl.when(size == ROWS)(functools.partial(_store_all, to, whole.at[i % 2], part))
        pl.when((size > 0) & (size < ROWS))(functools.partial(_store_some, to, some, part, begin, size))


def _store_all(to: Any, buffer: Any, part: Array) -> None:
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    buffer[...] = part.astype(to.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, to)


def _store_some(to: Any, buffer: Any, part: Array, begin: Any, size: Any) -> None:
    """A copy by TMA has as many rows as the kernel was compiled with, so there is one for each power of two."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = part.astype(to.dtype)
    plgpu.commit_smem()
    length = ROWS // 2
    while length:
        rows = pl.ds(begin, length)
        pl.when(size & length != 0)(functools.partial(plgpu.copy_smem_to_gmem, buffer.at[rows], to.at[rows]))
        begin += size & length
        length //= 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
