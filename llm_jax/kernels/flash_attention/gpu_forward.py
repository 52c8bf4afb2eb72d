"""Attention forward on Hopper: two warpgroups that compute, and one that fetches keys and values by TMA.

Each computing warpgroup holds `q_block` queries. They take turns at the tensor cores: while one multiplies, the other
is at its softmax (FlashAttention-3, https://arxiv.org/abs/2407.08608, section 3.1). The blocks of keys come in three
sections, of which only the outer two are masked.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels.flash_attention.gpu_common import (
    Scores,
    Stream,
    Tile,
    masked_ends,
    matrices,
    read_bounds,
    sections,
    spread,
)
from llm_jax.kernels.flash_attention.gpu_tiles import WARPGROUPS, ForwardTiles
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays
from llm_jax.kernels.mosaic_gpu_values import LOG2E, accumulate, constant, product


def forward(
    spec: AttentionSpec,
    tiles: ForwardTiles,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    slopes: Float[Array, " N"] | None,
    sinks: Float[Array, " N"] | None,
    masks: MaskArrays,
    bounds: Int[Array, "B tiles 4"],
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N padded"]]:
    """Output and log-sum-exp. Mask arrays are whole blocks long; `bounds` are `section_bounds` of the queries."""
    rows, kv_block, stages = tiles.q_block, tiles.kv_block, tiles.stages
    H, Hv, dtype = q.shape[3], v.shape[3], q.dtype
    q_tiles = bounds.shape[1]

    def kernel(
        q, k, v, slopes, sinks, masks, bounds, out, lse, *, q_smem, k_smem, v_smem, out_smem, lse_smem, **barriers
    ):
        batch, head, warpgroup = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("warpgroup")
        # The tiles that see most keys, the last ones where causal, go first.
        q_tile = q_tiles - 1 - lax.axis_index("q_tiles")
        kv_head = lax.div(head, jnp.int32(spec.group))
        low, full_low, full_high, high = read_bounds(bounds, batch, q_tile)

        def blocks(ref: Any) -> Any:
            return lambda j: ref.at[batch, pl.ds(j * kv_block, kv_block), kv_head]

        keys = Stream(stages, ((blocks(k), k_smem),), barriers["k_full"], barriers["k_empty"])
        values = Stream(stages, ((blocks(v), v_smem),), barriers["v_full"], barriers["v_empty"])

        def take_turns() -> None:
            plgpu.barrier_arrive_and_wait(barriers["turn"])

        def compute() -> None:
            q_start = (q_tile * WARPGROUPS + warpgroup) * rows
            q_mine, q_ready = q_smem.at[warpgroup], barriers["q_full"].at[warpgroup]
            plgpu.copy_gmem_to_smem(q.at[batch, pl.ds(q_start, rows), head], q_mine, q_ready)
            plgpu.barrier_wait(q_ready)
            scores = Scores(spec, None if slopes is None else slopes[head])

            def block(j: Array, state: tuple[Array, Array, Array], *, masked: bool) -> tuple[Array, Array, Array]:
                top, total, acc = state
                step = j - low
                keys.wait(step)
                raw = product(q_mine, keys.at(0, step).T, meanwhile=take_turns)
                keys.release(step)
                tile = Tile(spec, masks, batch, q_start, j * kv_block, (rows, kv_block), q_axis=0)
                logits, factor = scores.of(raw, tile, masked=masked)
                new_top = jnp.maximum(top, logits.max(1) * factor)
                # A row that has seen no key yet keeps -inf; exp2(-inf - 0) is the 0 that it needs.
                finite = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
                probs = jnp.exp2(logits * factor - spread(finite, raw.shape, 0))
                shrink = jnp.exp2(top - finite)
                total = total * shrink + probs.sum(1)
                acc = acc * spread(shrink, acc.shape, 0)
                probs = probs.astype(dtype)
                acc, total, new_top, probs = lax.optimization_barrier((acc, total, new_top, probs))

                def refill() -> None:
                    """With what is done with: these keys, and the values of the step before. Not earlier: the other
                    warpgroup reads these keys until it has had its turn, which comes with this one's."""
                    keys.refill(step + 1, j + stages < high, j + stages)
                    values.refill(step, j + stages - 1 < high, j + stages - 1)

                def fetch() -> None:
                    if not tiles.producer:
                        pl.when(warpgroup == 0)(refill)

                values.wait(step)
                take_turns()
                acc = accumulate(acc, probs, values.at(0, step), meanwhile=fetch)
                values.release(step)
                return new_top, total, acc

            if sinks is None:
                state = constant((rows,), -jnp.inf), constant((rows,), 0.0)
            else:
                state = constant((rows,), 0.0) + sinks[head] * LOG2E, constant((rows,), 1.0)
            pl.when(warpgroup == 1)(take_turns)
            ends = masked_ends(spec, of="queries", kv_block=kv_block)
            state = sections((low, full_low, full_high, high), ends, block, (*state, constant((rows, Hv), 0.0)))
            pl.when(warpgroup == 0)(take_turns)
            top, total, acc = state
            acc = acc * spread(jnp.where(total > 0, 1.0 / total, 0.0), acc.shape, 0)
            out_mine = q_mine if out_smem is None else out_smem.at[warpgroup]
            lse_mine = lse_smem.at[warpgroup]
            out_mine[...] = acc.astype(dtype)
            lse_mine[...] = (top + jnp.log2(total)) / LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_mine, out.at[batch, pl.ds(q_start, rows), head])
            plgpu.copy_smem_to_gmem(lse_mine, lse.at[batch, head, pl.ds(q_start, rows)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            if tiles.producer:
                plgpu.set_max_registers(232, action="increase")
            else:

                @pl.when(warpgroup == 0)
                def _() -> None:
                    keys.start(high - low, lambda step: (low + step,))
                    values.start(high - low, lambda step: (low + step,))

            compute()

        if tiles.producer:

            @pl.when(warpgroup == WARPGROUPS)
            def _() -> None:
                plgpu.set_max_registers(40, action="decrease")

                @pl.loop(0, high - low)
                def _(step: Array) -> None:
                    keys.fetch(step, low + step)
                    values.fetch(step, low + step)

    out_type = (
        jax.ShapeDtypeStruct((*q.shape[:3], Hv), dtype),
        jax.ShapeDtypeStruct((q.shape[0], spec.heads, q_tiles * WARPGROUPS * rows), jnp.float32),
    )
    scratch = dict(
        q_smem=matrices((WARPGROUPS, rows, H), dtype, summed=H),
        k_smem=matrices((stages, kv_block, H), dtype, summed=H),
        v_smem=matrices((stages, kv_block, Hv), dtype, summed=kv_block),
        out_smem=None if Hv == H else matrices((WARPGROUPS, rows, Hv), dtype, summed=Hv),
        lse_smem=plgpu.SMEM((WARPGROUPS, rows), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        k_full=plgpu.Barrier(num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        v_empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=WARPGROUPS),
    )
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(spec.heads, q_tiles, spec.batch),
        grid_names=("heads", "q_tiles", "batch"),
        num_threads=WARPGROUPS + tiles.producer,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="llm_jax_flash_attention_forward",
    )(q, k, v, slopes, sinks, masks, bounds)
