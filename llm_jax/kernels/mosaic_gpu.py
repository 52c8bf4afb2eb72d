"""Matrix products on Hopper's tensor cores, shared by the GPU kernels of several ops.

Imports Pallas: for kernel modules only. A block of threads makes one tile at a time: a warpgroup that copies (TMA), and
two that multiply (wgmma), each the upper or the lower half of the tile's rows. There are as many blocks as
multiprocessors; they go from tile to tile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from llm_jax.kernels import manual_axes

BLOCKS = "block"
WARPGROUP = "warpgroup"
WARPGROUPS = 2
"""Those that multiply."""
ROWS = 64
"""Rows of a tile that a warpgroup makes: as many as one wgmma."""
DEPTH = 64
"""What one step of the pipeline sums over: the 128 bytes of a swizzled row."""


def multiprocessors() -> int:
    """Of the device that the code being traced is for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].core_count if device is None else device.num_cores  # pyright: ignore[reportAttributeAccessIssue]


def matrices(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of matrices in 16 bits, laid out as TMA writes it and wgmma reads it."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1]))


def swizzled(width: int) -> tuple[Any, ...]:
    """The layout of 16-bit matrices whose rows are a multiple of `width` (32 or 64) long."""
    width = 64 if width % 64 == 0 else 32
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)  # pyright: ignore[reportAbstractUsage]


@dataclass(frozen=True)
class Operand:
    """A matrix in GMEM as the pipeline copies it: blocks, by the number of the step."""

    block: tuple[int, int]
    index: Callable[[Any], tuple[Any, Any]]

    def spec(self) -> plgpu.BlockSpec:
        """For `emit_pipeline_warp_specialized`."""
        return plgpu.BlockSpec(self.block, self.index, memory_space=plgpu.SMEM, transforms=swizzled(self.block[1]))


@dataclass(frozen=True)
class Product:
    """A tile of a product, summed over `steps` blocks of its operands, `stages` of which are under way at a time.

    `multiply(step, acc, *blocks)` adds to a warpgroup's half of the tile from blocks in shared memory, `finish(tile)`
    stores what it has in the end. With several `accumulators` as many tiles are made at once, and both functions get an
    argument for each.
    """

    operands: tuple[Operand, ...]
    width: int
    steps: Any
    stages: int
    multiply: Callable[..., None]
    accumulators: int = 1

    def _pipeline(self, finish: Callable[..., None]) -> Any:
        def context(run: Callable[[Any], Any]) -> None:
            def scope(*accs: Any) -> None:
                run(accs)
                finish(*(acc[...] for acc in accs))

            acc = plgpu.ACC((ROWS, self.width), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
            pl.run_scoped(scope, *[acc] * self.accumulators)

        def body(index: tuple[Any], *refs: Any) -> Any:
            *blocks, accs = refs
            self.multiply(index[0], *accs, *blocks)
            plgpu.wgmma_wait(0)
            return accs

        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(self.steps,),
            memory_registers=40,
            in_specs=[operand.spec() for operand in self.operands],
            wg_axis=WARPGROUP,
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=self.stages,
            compute_context=context,
        )

    def allocations(self, *matrices: Any) -> Any:
        """Shared memory and barriers, which all tiles of a block of threads use in turn."""
        return self._pipeline(lambda *tiles: None).get_allocations(*matrices)

    def run(self, *matrices: Any, allocations: Any, finish: Callable[..., None]) -> None:
        """Makes the tile of the matrices, which lie in GMEM."""
        self._pipeline(finish)(*matrices, allocations=allocations)


def half() -> Any:
    """The rows of a tile that the calling warpgroup makes."""
    return pl.ds(lax.axis_index(WARPGROUP) * ROWS, ROWS)


def store(to: Any, slots: Any, part: Array, i: int) -> None:
    """Stores the i-th part of a warpgroup's half of a tile, through two slots of shared memory in turn.

    What TMA still reads at the end, `plgpu.wait_smem_to_gmem(0)` waits for.
    """
    plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
    slot = slots.at[i % 2]
    slot[...] = part.astype(to.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, to)


def share(count: Any) -> Callable[[Callable[[Any], None]], None]:
    """Runs the decorated function of an index below `count`, which may be known at run time only, for those of this
    block: every so many-th."""
    blocks = jnp.int32(lax.axis_size(BLOCKS))
    block = lax.axis_index(BLOCKS)
    steps = lax.div(jnp.int32(count) - block + blocks - 1, blocks)

    def decorate(body: Callable[[Any], None]) -> None:
        lax.fori_loop(0, steps, lambda step, _: body(step * blocks + block), None)

    return decorate


def in_bands(rows: Int[Array, ""], most: int, columns: int, band: int) -> Int[Array, " items"]:
    """Tiles of `rows` (at most `most`) times `columns`, as row · columns + column, in the order to make them in: bands
    of `band` rows, each column by column, so that both operands stay in the L2 cache.

    Found before the kernel: ptxas calls a function to divide by a number that is known at run time only, and products
    no longer overlap in a kernel with calls.
    """
    number = jnp.arange(most * columns, dtype=jnp.int32)
    first = number // (band * columns) * band
    column, row = jnp.divmod(number - first * columns, jnp.clip(rows - first, 1, band))
    return (first + row) * columns + column


def launch(body: Callable[..., None], out_type: Any, *, tiles: int, name: str) -> Callable[..., Any]:
    """A kernel whose blocks share the work by `share`; no more of them than there may be tiles."""
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(min(tiles, multiprocessors()),),
        grid_names=(BLOCKS,),
        num_threads=WARPGROUPS + 1,
        thread_name=WARPGROUP,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=name,
    )
    # `plgpu.kernel` does not say that its outputs differ over the mesh axes over which its inputs do.
    return lambda *args: manual_axes.vary(kernel(*args), manual_axes.axes_of(args))


def padded(x: Array, multiples: tuple[int, ...]) -> Array:
    """With zeros behind each axis, up to a multiple."""
    widths = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x
