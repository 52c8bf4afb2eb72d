"""Rows times the weights of their group: tiles begin with their group, and those at its edges store less."""

import functools
from collections.abc import Callable, Sequence
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
from llm_jax.kernels.grouped_matmul.visits import visits
from llm_jax.kernels.mosaic_gpu import DEPTH, ROWS, WARPGROUP, WARPGROUPS

HEIGHT = WARPGROUPS * ROWS
ALIGN = 8
"""Rows of a swizzled tile of shared memory: TMA writes whole ones."""
STORED = 32
"""Columns that are stored at a time: what shared memory has room for beside the pipeline."""


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
    products, number by number in float32, and 0 of zeros; such a one may have its rows taken from tokens by `rows`.
    """
    made, dtype = weights[0].shape[1 if transposed else 2], sources[0].dtype
    m = sources[0].shape[0] if rows is None else rows.shape[0]
    height = -(-m // ALIGN) * ALIGN if m > HEIGHT else HEIGHT
    sources = [mosaic_gpu.padded(x, (height if rows is None else 1, DEPTH)) for x in sources]
    rows = None if rows is None else mosaic_gpu.padded(rows, (height,))
    of_weights = (1, tiles.width, DEPTH) if transposed else (1, DEPTH, tiles.width)
    weights = [mosaic_gpu.padded(w, of_weights) for w in weights]
    columns = weights[0].shape[1 if transposed else 2] // tiles.width
    plan = visits(group_sizes, height, HEIGHT, align=ALIGN, behind=False)
    items = mosaic_gpu.in_bands(plan.count, plan.group.shape[0], columns, tiles.band)
    kernel = mosaic_gpu.launch(
        functools.partial(_kernel, tiles=tiles, columns=columns, transposed=transposed, join=join),
        jax.ShapeDtypeStruct((height, columns * tiles.width), dtype),
        tiles=items.shape[0],
        name=name,
    )
    scalars = plan.count[None] * columns, items, plan.group, plan.first, plan.begin, plan.end
    return kernel(*scalars, rows, sources, weights)[:m, :made]


def _kernel(
    count_ref: Any,
    items_ref: Any,
    group_ref: Any,
    first_ref: Any,
    begin_ref: Any,
    end_ref: Any,
    rows_ref: Any,
    source_refs: list[Any],
    weight_refs: list[Any],
    out_ref: Any,
    *,
    tiles: Tiles,
    columns: int,
    transposed: bool,
    join: Callable[..., Array] | None,
) -> None:
    height, summed = out_ref.shape[0], source_refs[0].shape[1]
    sides = len(source_refs), len(weight_refs)
    accumulators = 1 if join is None else sides[1]

    def product(start: Any, column: Any) -> mosaic_gpu.Product:
        def multiply(step: Any, *parts: Any) -> None:
            accs, blocks = parts[:accumulators], parts[accumulators:]
            for i, weights in enumerate(blocks[sides[0] :]):
                block, acc = blocks[min(i, sides[0] - 1)], accs[min(i, accumulators - 1)]
                plgpu.wgmma(acc, block.at[mosaic_gpu.half()], weights.T if transposed else weights)

        of_rows = mosaic_gpu.Operand((HEIGHT, DEPTH), lambda k: (0, k))
        of_weights = (
            mosaic_gpu.Operand((tiles.width, DEPTH), lambda k: (column, k))
            if transposed
            else mosaic_gpu.Operand((DEPTH, tiles.width), lambda k: (k, column))
        )
        kind = mosaic_gpu.Product
        if rows_ref is not None:
            kind = functools.partial(TakenProduct, rows=rows_ref.at[pl.ds(start, HEIGHT)])
        return kind(
            operands=(of_rows,) * sides[0] + (of_weights,) * sides[1],
            width=tiles.width,
            steps=summed // DEPTH,
            stages=tiles.stages,
            multiply=multiply,
            accumulators=accumulators,
        )

    def matrices(start: Any, group: Any) -> list[Any]:
        """The rows of a tile, or what they are taken from, and the weights of a group."""
        sources = source_refs if rows_ref is not None else [x.at[pl.ds(start, HEIGHT), :] for x in source_refs]
        return [*sources, *(w.at[group] for w in weight_refs)]

    def scope(pipeline: Any, whole: Any, some: Any) -> None:
        wg = lax.axis_index(WARPGROUP)

        def place(first: Any, begin: Any, end: Any, column: Any) -> tuple[Any, Any]:
            """Where a tile begins, and how a warpgroup stores its half."""
            # The last tile of all would reach over the last row: it begins earlier, with rows that are not its own.
            start = pl.multiple_of(jnp.minimum(first, height - HEIGHT), ALIGN)
            at = pl.multiple_of(start + wg * ROWS, ALIGN)
            top = jnp.clip(jnp.maximum(first, begin) - at, 0, ROWS)
            size = jnp.maximum(jnp.clip(end - at, 0, ROWS) - top, 0)
            to = out_ref.at[pl.ds(at, ROWS), pl.ds(column * tiles.width, tiles.width)]
            return start, functools.partial(_store, to, whole.at[wg], some.at[wg], begin=top, size=size, join=join)

        @mosaic_gpu.share(count_ref[0])
        def _(i: Any) -> None:
            v, column = lax.div(items_ref[i], columns), lax.rem(items_ref[i], columns)
            group = group_ref[v]
            start, store = place(first_ref[v], begin_ref[group], end_ref[group], column)
            product(start, column).run(*matrices(start, group), allocations=pipeline, finish=store)

        behind = end_ref[end_ref.shape[0] - 1]
        origin = lax.div(behind, ALIGN) * ALIGN

        @mosaic_gpu.share(lax.div(height - origin + HEIGHT - 1, HEIGHT) * columns)
        def _(i: Any) -> None:
            v, column = lax.div(i, columns), lax.rem(i, columns)
            _, store = place(origin + v * HEIGHT, behind, height, column)

            @pl.when(wg < WARPGROUPS)
            def _():
                zeros = jnp.zeros((ROWS, tiles.width), jnp.float32)
                store(*[plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)] * accumulators)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(
        scope,
        pipeline=product(0, 0).allocations(*matrices(0, 0)),
        whole=mosaic_gpu.matrices((WARPGROUPS, 2, ROWS, STORED), out_ref.dtype),
        some=plgpu.SMEM((WARPGROUPS, ROWS, STORED), out_ref.dtype),
        collective_axes=WARPGROUP,
    )


def _store(
    out_ref: Any, whole: Any, some: Any, *tiles: Array, begin: Any, size: Any, join: Callable[..., Array] | None
) -> None:
    """Rows [begin, begin + size) of a warpgroup's half of a tile, or of what `join` makes of several."""
    for i, column in enumerate(range(0, tiles[0].shape[1], STORED)):
        parts = [tile[:, column : column + STORED] for tile in tiles]
        part, to = parts[0] if join is None else join(*parts), out_ref.at[:, pl.ds(column, STORED)]
        pl.when(size == ROWS)(functools.partial(mosaic_gpu.store, to, whole, part, i))
        pl.when((size > 0) & (size < ROWS))(functools.partial(_store_some, to, some, part, begin, size))


def _store_some(to: Any, buffer: Any, part: Array, begin: Any, size: Any) -> None:
    """`size` rows from `begin` on, one at least.

    A copy by TMA has as many rows as the kernel was compiled with, so there is one for each power of two. Of several
    rows it reads from multiples of 128 bytes only (the interpreter does not mind). A row has 64, and `buffer` begins at
    such a multiple, so every even row does. A first row that is odd goes by itself; behind it all copies begin at even
    rows, whatever `begin` was, as only the last of them may have an odd number of rows.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = part.astype(to.dtype)
    plgpu.commit_smem()

    def copy(length: int, wanted: Any) -> None:
        rows = pl.ds(begin, length)
        pl.when(wanted)(functools.partial(plgpu.copy_smem_to_gmem, buffer.at[rows], to.at[rows]))

    odd = lax.rem(begin, 2)
    copy(1, odd == 1)
    begin, size = begin + odd, size - odd
    length = ROWS // 2
    while length:
        copy(length, size & length != 0)
        begin += size & length
        length //= 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
