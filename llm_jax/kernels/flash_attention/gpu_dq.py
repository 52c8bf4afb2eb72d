"""Gradient of the queries on Hopper, and sums for those of slopes and sinks: one tile of queries, over the blocks of
keys that it sees.

Two warpgroups, each with its own queries; the first one fetches keys and values. Without a third one that only fetches,
a thread has 255 registers and not 168, which the three matrices in registers need.
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
    load,
    masked_ends,
    matrices,
    read_bounds,
    sections,
    spread,
    two_products,
)
from llm_jax.kernels.flash_attention.gpu_tiles import WARPGROUPS, BackwardTiles
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays
from llm_jax.kernels.mosaic_gpu_values import accumulate, again, constant


def dq(
    spec: AttentionSpec,
    tiles: BackwardTiles,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
    bounds: Int[Array, "B tiles 4"],
    d_out: Float[Array, "B T N Hv"],
    statistics: Float[Array, "B N 2 padded"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B sums N padded"] | None]:
    """Gradient of the queries, and what `RowSums` says, one after another.

    `statistics`: log-sum-exp in base 2, +inf for rows that see nothing; sum(out · d_out) less the former's cotangent.
    """
    kinds = spec.row_sums
    rows, kv_block, stages = tiles.dq_q_block, tiles.dq_kv_block, tiles.dq_stages
    H, Hv, dtype = q.shape[3], v.shape[3], q.dtype
    q_tiles = bounds.shape[1]

    def kernel(
        q,
        k,
        v,
        slopes,
        masks,
        bounds,
        d_out,
        statistics,
        dq,
        sums,
        *,
        q_smem,
        o_smem,
        k_smem,
        v_smem,
        sums_smem,
        **barriers,
    ):
        ends = masked_ends(spec, of="queries", kv_block=kv_block)
        batch, head, warpgroup = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("warpgroup")
        q_tile = q_tiles - 1 - lax.axis_index("q_tiles")
        kv_head = lax.div(head, jnp.int32(spec.group))
        low, full_low, full_high, high = read_bounds(bounds, batch, q_tile)
        q_start = (q_tile * WARPGROUPS + warpgroup) * rows
        queries = (batch, pl.ds(q_start, rows), head)

        def blocks(ref: Any) -> Any:
            return lambda j: ref.at[batch, pl.ds(j * kv_block, kv_block), kv_head]

        parts = ((blocks(k), k_smem), (blocks(v), v_smem))
        stream = Stream(stages, parts, barriers["full"], barriers["empty"])
        pl.when(warpgroup == 0)(lambda: stream.start(high - low, lambda step: (low + step,)))
        q_mine, o_mine, ready = q_smem.at[warpgroup], o_smem.at[warpgroup], barriers["q_full"].at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[queries], q_mine, ready)
        plgpu.copy_gmem_to_smem(d_out.at[queries], o_mine, ready)
        my_lse, my_delta = (load(statistics.at[batch, head, i, pl.ds(q_start, rows)], 0) for i in range(2))
        scores = Scores(spec, None if slopes is None else slopes[head])
        plgpu.barrier_wait(ready)

        def block(j: Array, state: tuple[Array, ...], *, masked: bool) -> tuple[Array, ...]:
            step = j - low
            shape = (rows, kv_block)
            tile = Tile(spec, masks, batch, q_start, j * kv_block, shape, q_axis=0)

            def probabilities(raw: Array) -> tuple[Array, Array]:
                """And the same times the slope of the cap."""
                probs, slope = scores.probabilities(raw, tile, spread(my_lse, shape, 0), masked=masked)
                return probs, probs if slope is None else probs * slope

            pl.when(warpgroup == 0)(lambda: stream.advance(step, j + 1 < high, j + 1))
            stream.wait(step)
            keys, values = stream.at(0, step), stream.at(1, step)
            mine = again(warpgroup)
            both = ((q_smem.at[mine], keys.T),), ((o_smem.at[mine], values.T),)
            (probs, weights), d_probs = two_products(*both, probabilities)
            total, *added = state
            if kinds:
                added[0] += (probs * d_probs).sum(1)
            if slopes is not None:
                biased = probs * tile.bias(1.0)
                added[1:] = added[1] + (biased * d_probs).sum(1), added[2] + biased.sum(1)
            d_logits = weights * (d_probs - spread(my_delta, shape, 0))
            total = accumulate(total, d_logits.astype(dtype), keys)
            stream.release(step)
            return total, *added

        state = constant((rows, H), 0.0), *(constant((rows,), 0.0) for _ in range(kinds))
        total, *added = sections((low, full_low, full_high, high), ends, block, state)
        q_mine[...] = (total * spec.scale).astype(dtype)
        for i, one in enumerate(added):
            sums_smem[warpgroup, i] = one
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_mine, dq.at[queries])
        for i in range(kinds):
            plgpu.copy_smem_to_gmem(sums_smem.at[warpgroup, i], sums.at[batch, i, head, pl.ds(q_start, rows)])
        plgpu.wait_smem_to_gmem(0)

    B, N, _, padded = statistics.shape
    per_query = jax.ShapeDtypeStruct((B, kinds, N, padded), jnp.float32) if kinds else None
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(q.shape, dtype), per_query),
        scratch_types=dict(
            q_smem=matrices((WARPGROUPS, rows, H), dtype, summed=kv_block),
            o_smem=matrices((WARPGROUPS, rows, Hv), dtype, summed=Hv),
            k_smem=matrices((stages, kv_block, H), dtype, summed=kv_block),
            v_smem=matrices((stages, kv_block, Hv), dtype, summed=Hv),
            sums_smem=plgpu.SMEM((WARPGROUPS, kinds, rows), jnp.float32) if kinds else None,
            q_full=plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ),
        grid=(spec.heads, q_tiles, spec.batch),
        grid_names=("heads", "q_tiles", "batch"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="llm_jax_flash_attention_dq",
    )(q, k, v, slopes, masks, bounds, d_out, statistics)
