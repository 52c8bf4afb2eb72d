"""Gradients of the states: one block of threads per row and head, over the chunks in reverse; two warpgroups.

Warpgroup w has 64 of the state's 128 rows, in float32 registers, and 64 tokens of each chunk.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels.manual_axes import like
from llm_jax.kernels.ssd.gpu import CHUNK, HALF, Layout
from llm_jax.kernels.ssd.gpu_chunk import WARPGROUPS, Rows, matrices, over, product, read, since

STAGES = 2


def run(
    cut: Layout,
    rows: Float[Array, "2 B h t"],
    run: Int[Array, "B t"] | None,
    c: Float[Array, "B t G 128"],
    states: Float[Array, "B h chunks 128 64"],
    dy: Float[Array, "B t h 64"],
    d_final: Float[Array, "B h 128 64"],
) -> tuple[Array, Array, Array]:
    """Gradients of the states after each chunk in dy's dtype, as `states`; their products with the states before it,
    summed over channels [B, h, chunks, 128]; gradient of the initial state."""
    dtype, halves = dy.dtype, range(WARPGROUPS)

    def kernel(
        rows, run, c, states, dy, d_final, d_states, kept, d_initial,
        *, dy_s, c_s, d_state_s, since_dy_s, full, empty, both,
    ):  # fmt: skip
        batch, head, w = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        group = lax.div(head, jnp.int32(cut.per_group))
        mine = pl.ds(w * HALF, HALF)

        def fetch(step: Any) -> None:
            slot, start = lax.rem(step, jnp.int32(STAGES)), (cut.chunks - 1 - step) * CHUNK
            for half in halves:
                at = pl.ds(start + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(dy.at[batch, at, head], dy_s.at[slot, half], full.at[slot])
                for panel in halves:
                    source = c.at[batch, at, group, pl.ds(panel * HALF, HALF)]
                    plgpu.copy_gmem_to_smem(source, c_s.at[slot, half, panel], full.at[slot])

        pl.when(w == 0)(lambda: fetch(jnp.int32(0)))

        def chunk(step: Array, d_state: Array) -> Array:
            slot, j = lax.rem(step, jnp.int32(STAGES)), cut.chunks - 1 - step

            @pl.when((w == 0) & (step + 1 < cut.chunks))
            def _() -> None:
                pl.when(step > 0)(lambda: plgpu.barrier_wait(empty.at[1 - slot]))
                fetch(step + 1)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            d_state_s[w] = d_state.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(d_state_s.at[w], d_states.at[batch, head, j, mine])
            products = jnp.sum(d_state * read(states.at[batch, head, j, mine]), axis=1)
            plgpu.store(kept.at[batch, head, j, mine], products, optimized=False)

            at = Rows(rows, run, batch, head, j * CHUNK)
            left = over(since(at.side(w, 0)), 0)
            plgpu.barrier_wait(full.at[slot])
            since_dy_s[slot, w] = (left * read(dy_s.at[slot, w])).astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive_and_wait(both)
            made = product(*((c_s.at[slot, half, w].T, since_dy_s.at[slot, half]) for half in halves))
            plgpu.barrier_arrive(empty.at[slot])
            return at.last() * d_state + made

        d_state = lax.fori_loop(0, cut.chunks, chunk, read(d_final.at[batch, head, mine]))
        plgpu.store(d_initial.at[batch, head, mine], d_state, optimized=False)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            like(dy, states.shape, dtype),
            like(dy, states.shape[:-1], jnp.float32),
            like(dy, d_final.shape, jnp.float32),
        ),
        scratch_types=dict(
            dy_s=matrices(STAGES, 2, dtype=dtype),
            c_s=matrices(STAGES, 2, 2, dtype=dtype),
            d_state_s=matrices(2, dtype=dtype),
            since_dy_s=matrices(STAGES, 2, dtype=dtype),
            full=plgpu.Barrier(num_arrivals=6, num_barriers=STAGES),
            empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            both=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(cut.heads, cut.batch),
        grid_names=("head", "batch"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="llm_jax_ssd_backward_states",
    )(rows, run, c, states, dy, d_final)
