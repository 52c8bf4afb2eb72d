"""Products whose rows a GPU kernel takes from x itself, by an index for each, on the way to shared memory.

Hopper's TMA has no gather, and a TMA copy for each row would have every thread of the warpgroup that copies arrive at a
barrier for every row: 16,384 arrivals a step, of which the product takes some 1,100 cycles. So the rows come by
`cp.async`, 16 bytes a thread and 1,024 such pieces a block, to where TMA would have put them; the other operand comes
by TMA. Only the threads that copy know when their pieces are there: they announce a block some steps later.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llm_jax.kernels import mosaic_gpu
from llm_jax.kernels.mosaic_gpu import DEPTH, ROWS, WARPGROUP, WARPGROUPS
from llm_jax.kernels.platform import interpreted

THREADS = 128
"""Of a warpgroup."""
PIECE = 8
"""16-bit numbers that a thread copies at a time."""


@dataclass(frozen=True)
class TakenProduct(mosaic_gpu.Product):
    """A product whose first operand is x[rows]; `run` gets x as the first matrix."""

    _: KW_ONLY
    rows: Any
    """In GMEM, int32, all in range: whole blocks are read."""

    def allocations(self, *matrices: Any) -> Any:
        blocks = zip(self.operands, matrices, strict=True)
        return {
            "buffers": [mosaic_gpu.matrices((self.stages, *each.block), matrix.dtype) for each, matrix in blocks],
            # One by each of TMA's copies, as it is started and counted by its bytes, and one that announces the rows.
            "full": plgpu.Barrier(num_arrivals=len(self.operands), num_barriers=self.stages),
            "empty": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=self.stages),
        }

    def run(self, *matrices: Any, allocations: Any, finish: Callable[..., None]) -> None:
        buffers, full, empty = (allocations[name] for name in ("buffers", "full", "empty"))
        steps = jnp.int32(self.steps)

        def slot_of(step: Any) -> Any:
            return lax.rem(step, jnp.int32(self.stages))

        def compute(*accs: Any) -> None:
            def one(step: Any, _: None) -> None:
                slot = slot_of(step)
                plgpu.barrier_wait(full.at[slot])
                self.multiply(step, *accs, *(blocks.at[slot] for blocks in buffers))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[slot])

            lax.fori_loop(0, steps, one, None)
            finish(*(acc[...] for acc in accs))

        # This many blocks are on their way when the one before them is announced. With one more, that one would be all
        # there is to multiply until the next is announced, which waits for its buffer.
        ahead = self.stages - 2

        def announce(step: Any) -> None:
            plgpu.commit_smem()
            plgpu.barrier_arrive(full.at[slot_of(step)])

        def copy(step: Any, _: None) -> None:
            slot = slot_of(step)
            pl.when(step >= self.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            places = [
                [pl.ds(i * size, size) for i, size in zip(operand.index(step), operand.block, strict=True)]
                for operand in self.operands
            ]
            for matrix, place, blocks in list(zip(matrices, places, buffers, strict=True))[1:]:
                plgpu.copy_gmem_to_smem(matrix.at[*place], blocks.at[slot], full.at[slot])
            rows, columns = places[0]
            _take(matrices[0].at[:, columns], self.rows.at[rows], buffers[0].at[slot])
            _await(ahead)
            pl.when(step >= ahead)(lambda: announce(step - ahead))

        @pl.when(lax.axis_index(WARPGROUP) < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            acc = plgpu.ACC((ROWS, self.width), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
            pl.run_scoped(compute, *[acc] * self.accumulators)

        @pl.when(lax.axis_index(WARPGROUP) == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            lax.fori_loop(0, steps, copy, None)
            _await(0)
            lax.fori_loop(jnp.maximum(steps - ahead, 0), steps, lambda step, _: announce(step), None)
            # The next tile finds all buffers free.
            last = jnp.maximum(steps - self.stages, 0)
            lax.fori_loop(last, steps, lambda step, _: plgpu.barrier_wait(empty.at[slot_of(step)]), None)


def _take(x: Any, rows: Any, block: Any) -> None:
    """Starts the copies of x[rows] to a block of shared memory, as one group."""
    if interpreted():  # the interpreter has no copies but TMA's
        block[...] = x[...].at[rows[...]].get(mode="fill")
        return

    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

    height, width = block.shape
    swizzled = plgpu.RefType(transforms=mosaic_gpu.swizzled(DEPTH))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), swizzled))
    def start(context: Any, x: Any, rows: Any, block: Any) -> None:
        index, i64 = ir.IndexType.get(), ir.IntegerType.get_signless(64)
        (stride, _), _ = x.type.get_strides_and_offset()
        thread = mgpu.FragmentedArray.splat(mgpu.utils.thread_idx(), (), is_signed=False) % THREADS
        source, target = (mgpu.utils.memref_ptr(each) for each in (x, block))
        source = llvm.addrspacecast(llvm.PointerType.get(address_space=1), source)
        for i in range(height * width // PIECE // THREADS):
            row, piece = divided(thread + i * THREADS, width // PIECE)
            token = arith.extui(i64, memref.load(rows, [arith.index_cast(index, row.registers.item())]))
            column = arith.extui(i64, (piece * PIECE).registers.item())
            number = arith.addi(arith.muli(token, mgpu.c(stride, i64)), column)
            nvvm.cp_async_shared_global(
                mgpu.utils.getelementptr(target, [in_block(row, piece, width).registers.item()], x.type.element_type),
                mgpu.utils.getelementptr(source, [number], x.type.element_type),
                2 * PIECE,
                nvvm.LoadCacheModifierKind.CG,
            )
        nvvm.cp_async_commit_group()

    start(x, rows, block)  # pyright: ignore[reportCallIssue]


def _await(groups: int) -> None:
    """Until all copies but those of the last `groups` calls of `_take` are done."""
    if interpreted():
        return

    @plgpu.inline_mgpu()
    def wait(context: Any) -> None:
        context.await_cp_async_copy(groups)

    wait()  # pyright: ignore[reportCallIssue]


def divided(n: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of a number at least 0, by a power of two."""
    return n // by, n % by


def in_block(row: Any, piece: Any, width: int) -> Any:
    """Where a block in shared memory has the numbers [PIECE * piece, PIECE * (piece + 1)) of a row.

    Blocks are cut into tiles of 8 rows of 128 bytes, in row-major order. Of each row of a tile the pieces lie in the
    order p ^ row, which spreads a column over the banks: the 128-byte swizzle of CUDA's TMA and wgmma.
    """
    per_row = DEPTH // PIECE
    tile, piece = divided(piece, per_row)
    down, inner = divided(row, 8)
    return (down * (width // DEPTH) + tile) * (8 * DEPTH) + inner * DEPTH + (piece ^ inner) * PIECE
