"""Gradient of B Cᵀ within each chunk, summed over a few heads by one block of threads; two warpgroups.

Warpgroup w has the sources 64 w to 64 w + 63 of a tile [source, reader]: one or two squares of it, in registers. The
first one fetches the next head while both compute. It is a kernel of its own because the sums of two squares leave the
kernel of the other gradients too few registers.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels.manual_axes import like
from llm_jax.kernels.ssd.gpu import CHUNK, HALF, Layout
from llm_jax.kernels.ssd.gpu_chunk import WARPGROUPS, Rows, between, matrices, nothing, over, product, read, sees

STAGES = 2


def run(
    cut: Layout,
    most: int,
    x: Float[Array, "B t h 64"],
    rows: Float[Array, "2 B h t"],
    run: Int[Array, "B t"] | None,
    dy: Float[Array, "B t h 64"],
) -> Float[Array, "B chunks blocks 128 128"]:
    """[source, reader]; the blocks of a group, each of at most so many heads, follow one another."""
    dtype, halves = x.dtype, range(WARPGROUPS)
    per_block = cut.heads_of_block(most)
    blocks = cut.heads // per_block

    def kernel(x, rows, run, dy, d_products, *, x_s, dy_s, seen_s, full, empty):
        batch, j, block, w = (lax.axis_index(name) for name in ("batch", "chunk", "block", "warpgroup"))
        first, start = block * per_block, j * CHUNK

        def fetch(i: Any) -> None:
            slot = lax.rem(i, jnp.int32(STAGES))
            for half in halves:
                at = pl.ds(start + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(x.at[batch, at, first + i], x_s.at[slot, half], full.at[slot])
                plgpu.copy_gmem_to_smem(dy.at[batch, at, first + i], dy_s.at[slot, half], full.at[slot])

        pl.when(w == 0)(lambda: fetch(jnp.int32(0)))

        # The mask is read from shared memory: what it is made of would be kept in registers from head to head.
        def mask(half: Array, _: None) -> None:
            at = Rows(rows, run, batch, first, start)
            seen_s[w + half] = jnp.where(sees(at.side(half, 1), 1, at.side(w, 0)), 1.0, 0.0).astype(dtype)

        lax.fori_loop(w, WARPGROUPS, mask, None)
        plgpu.commit_smem()

        def one_head(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
            slot = lax.rem(i, jnp.int32(STAGES))

            @pl.when((w == 0) & (i + 1 < per_block))
            def _() -> None:
                pl.when(i > 0)(lambda: plgpu.barrier_wait(empty.at[1 - slot]))
                fetch(i + 1)

            at = Rows(rows, run, batch, first + i, start)
            sources = at.side(w, 0)
            plgpu.barrier_wait(full.at[slot])

            def tile(half: Any, total: Array) -> Array:
                left = between(at.side(half, 1), 1, sources, read(seen_s.at[w + half]) > 0)
                return total + product((x_s.at[slot, w], dy_s.at[slot, half].T)) * over(sources.dt, 0) * left

            own = tile(w, totals[0])
            later = lax.fori_loop(w, 1, lambda _, total: tile(1, total), totals[1])
            plgpu.barrier_arrive(empty.at[slot])
            return own, later

        own, later = lax.fori_loop(0, per_block, one_head, (nothing(), nothing()))
        own_rows, other_rows = pl.ds(w * HALF, HALF), pl.ds((1 - w) * HALF, HALF)
        for made, columns in ((own, own_rows), (later, other_rows)):
            plgpu.store(d_products.at[batch, j, block, own_rows, columns], made, optimized=False)

    return plgpu.kernel(
        kernel,
        out_type=like(x, (cut.batch, cut.chunks, blocks, CHUNK, CHUNK), jnp.float32),
        scratch_types=dict(
            x_s=matrices(STAGES, 2, dtype=dtype),
            dy_s=matrices(STAGES, 2, dtype=dtype),
            seen_s=matrices(3, dtype=dtype),
            full=plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
            empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        ),
        grid=(blocks, cut.chunks, cut.batch),
        grid_names=("block", "chunk", "batch"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="llm_jax_ssd_backward_products",
    )(x, rows, run, dy)
