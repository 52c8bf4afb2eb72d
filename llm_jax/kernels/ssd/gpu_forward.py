"""Outputs: one block of threads per row and head, over the chunks in order; two warpgroups.

Warpgroup w has tokens 64 w to 64 w + 63 of each chunk, and the same of the state's 128 rows, in float32 registers.
The first one fetches the next chunk while both compute.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels.manual_axes import like
from llm_jax.kernels.ssd.decay import remaining
from llm_jax.kernels.ssd.gpu import CHUNK, HALF, STATES, Layout
from llm_jax.kernels.ssd.gpu_chunk import (
    TILE,
    WARPGROUPS,
    Rows,
    between,
    matrices,
    over,
    product,
    read,
    same_document,
    since,
)

STAGES = 2


def run(
    cut: Layout,
    x: Float[Array, "B t h 64"],
    rows: Float[Array, "2 B h t"],
    run: Int[Array, "B t"] | None,
    b: Float[Array, "B t G 128"],
    c: Float[Array, "B t G 128"],
    skip: Float[Array, " h"],
    initial: Float[Array, "B h 128 64"],
    *,
    keep_states: bool,
) -> tuple[Array, Array, Array | None]:
    """Output, final state, states before each chunk in x's dtype [B, h, chunks, 128, 64]; laid out as in `gpu`."""
    dtype, halves = x.dtype, range(WARPGROUPS)

    def kernel(
        x, rows, run, b, c, skip, initial, y, final, states,
        *, x_s, b_s, c_s, state_s, left_s, arriving_s, lower_s, full, empty, both,
    ):  # fmt: skip
        batch, head, w = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        group = lax.div(head, jnp.int32(cut.per_group))
        mine = pl.ds(w * HALF, HALF)

        def fetch(j: Any) -> None:
            slot = lax.rem(j, jnp.int32(STAGES))
            for half in halves:
                at = pl.ds(j * CHUNK + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(x.at[batch, at, head], x_s.at[slot, half], full.at[slot])
                for panel in halves:
                    columns = pl.ds(panel * HALF, HALF)
                    for ref, buffer in ((b, b_s), (c, c_s)):
                        source = ref.at[batch, at, group, columns]
                        plgpu.copy_gmem_to_smem(source, buffer.at[slot, half, panel], full.at[slot])

        pl.when(w == 0)(lambda: fetch(jnp.int32(0)))

        # Read from shared memory: what it is made of would be kept in registers from chunk to chunk.
        @pl.when(w == 0)
        def _() -> None:
            row, column = (plgpu.broadcasted_iota(jnp.int32, TILE, i, layout=plgpu.Layout.WGMMA) for i in range(2))
            lower_s[...] = jnp.where(row >= column, 1.0, 0.0).astype(dtype)

        state = read(initial.at[batch, head, mine])
        state_s[w] = state.astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive_and_wait(both)

        def chunk(j: Array, state: Array) -> Array:
            slot = lax.rem(j, jnp.int32(STAGES))

            @pl.when((w == 0) & (j + 1 < cut.chunks))
            def _() -> None:
                pl.when(j > 0)(lambda: plgpu.barrier_wait(empty.at[1 - slot]))
                fetch(j + 1)

            at = Rows(rows, run, batch, head, j * CHUNK)
            tokens = at.side(w, 0)
            plgpu.barrier_wait(full.at[slot])
            if states is not None:
                plgpu.copy_smem_to_gmem(state_s.at[w], states.at[batch, head, j, mine])
            own_c = [c_s.at[slot, w, panel] for panel in halves]
            from_state = product(*((own_c[panel], state_s.at[panel]) for panel in halves))
            total = remaining(over(since(tokens), 0), from_state)

            def within(half: Any, total: Array, *, own: bool) -> Array:
                sources = at.side(half, 1)
                seen = None if run is None else same_document(tokens, 0, sources)
                if own:
                    lower = read(lower_s) > 0
                    seen = lower if seen is None else lower & seen
                raw = product(*((own_c[panel], b_s.at[slot, half, panel].T) for panel in halves))
                left_s[w] = (raw * between(tokens, 0, sources, seen) * over(sources.dt, 1)).astype(dtype)
                plgpu.commit_smem()
                return total + product((left_s.at[w], x_s.at[slot, half]))

            # What left_s held of the chunk before has been read by its copy to global memory.
            plgpu.wait_smem_to_gmem(0 if states is None else 1, wait_read_only=True)
            total = lax.fori_loop(0, w, lambda _, total: within(0, total, own=False), total)
            total = within(w, total, own=True)
            arriving_s[w] = (over(at.until(tokens) * tokens.dt, 0) * read(x_s.at[slot, w])).astype(dtype)
            left_s[w] = (total + skip[head] * read(x_s.at[slot, w])).astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive_and_wait(both)
            arrived = product(*((b_s.at[slot, half, w].T, arriving_s.at[half]) for half in halves))
            plgpu.barrier_arrive(empty.at[slot])
            state = remaining(lax.broadcast(at.last(), TILE), state) + arrived
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            state_s[w] = state.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(left_s.at[w], y.at[batch, pl.ds(j * CHUNK + w * HALF, HALF), head])
            plgpu.barrier_arrive_and_wait(both)
            return state

        state = lax.fori_loop(0, cut.chunks, chunk, state)
        plgpu.store(final.at[batch, head, mine], state, optimized=False)
        plgpu.wait_smem_to_gmem(0)

    kept = like(x, (cut.batch, cut.heads, cut.chunks, STATES, HALF), dtype)
    return plgpu.kernel(
        kernel,
        out_type=(like(x, x.shape, dtype), like(x, initial.shape, jnp.float32), kept if keep_states else None),
        scratch_types=dict(
            x_s=matrices(STAGES, 2, dtype=dtype),
            b_s=matrices(STAGES, 2, 2, dtype=dtype),
            c_s=matrices(STAGES, 2, 2, dtype=dtype),
            state_s=matrices(2, dtype=dtype),
            left_s=matrices(2, dtype=dtype),
            arriving_s=matrices(2, dtype=dtype),
            lower_s=matrices(dtype=dtype),
            full=plgpu.Barrier(num_arrivals=10, num_barriers=STAGES),
            empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            both=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(cut.heads, cut.batch),
        grid_names=("head", "batch"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="llm_jax_ssd_forward",
    )(x, rows, run, b, c, skip, initial)
