"""One tile of queries and one key head per block of threads, or a part of its keys; pages come by TMA.

A tile has 64 rows for each warpgroup, of which a decoding request fills as many as its group has heads: reading the
keys takes longer than multiplying with empty rows. The first warpgroup starts the copies, one per page, as many blocks
ahead as there are buffers. Page ids lie in shared memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels.mosaic_gpu import matrices
from llm_jax.kernels.mosaic_gpu_values import LOG2E, accumulate, constant, indices, per_row, product, spread
from llm_jax.kernels.ragged_paged_attention.gpu import Sizes
from llm_jax.kernels.ragged_paged_attention.pages import Pages
from llm_jax.kernels.ragged_paged_attention.spec import RaggedSpec
from llm_jax.kernels.ragged_paged_attention.work import Tiles

WARPGROUP_ROWS = 64
COPIED = 256
"""The most numbers along an axis that one copy brings."""
STORED_ROWS = 8
"""Rows are stored in multiples of so many."""


def attention(
    spec: RaggedSpec,
    sizes: Sizes,
    splits: int,
    work: Tiles,
    page_tables: Int[Array, "R M"],
    q: Float[Array, "I K r H"],
    pages: Pages,
    slopes: Float[Array, "K r"] | None,
    sinks: Float[Array, "K r"] | None,
) -> tuple[Float[Array, "splits I K r Hv"], Float[Array, "splits I K r"]]:
    """Outputs (float32 where there are several parts) and log-sum-exps, by part of the keys and by tile."""
    assert pages.v is not None
    tiles, K, rows, H = q.shape
    Hv, dtype, block, stages = spec.value_dim, q.dtype, sizes.block, sizes.stages
    warpgroups = 2 if rows > WARPGROUP_ROWS else 1
    unit = 2 * WARPGROUP_ROWS if warpgroups == 2 else STORED_ROWS
    padded = -(-rows // unit) * unit
    row_tiles = max(1, padded // (warpgroups * WARPGROUP_ROWS))
    stored = min(padded, WARPGROUP_ROWS)
    """Rows of a warpgroup that are loaded and stored."""
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    slopes, sinks = (None if x is None else _in_tiles(x, row_tiles * warpgroups) for x in (slopes, sinks))
    meta = jnp.stack([work.request, work.count, work.position, work.first, work.end], axis=1)
    line = min(COPIED, -(-spec.table // 4) * 4)  # TMA takes multiples of 16 bytes
    tables = jnp.pad(page_tables, ((0, 0), (0, -spec.table % line))).reshape(spec.requests, -1, line)
    copy_slots = min(block, spec.page_size)

    def kernel(q, k, v, slopes, sinks, meta, tables, out, lse, *, q_smem, ids, lse_smem, buffers, **barriers):
        (k_smem, v_smem), (out_smem,) = buffers
        part, tile, head = lax.axis_index("parts"), lax.axis_index("tiles"), lax.axis_index("heads")
        warpgroup = lax.axis_index("warpgroup")
        request, count, position, first, end = (meta[tile, i] for i in range(5))
        row_block = lax.axis_index("rows") * warpgroups + warpgroup
        first_row = row_block * WARPGROUP_ROWS

        low, high = lax.div(first, jnp.int32(block)), pl.cdiv(end, jnp.int32(block))
        share = pl.cdiv(high - low, jnp.int32(splits))
        low = jnp.minimum(low + part * share, high)
        high = jnp.minimum(low + share, high)
        # Blocks that all tokens see whole, and those before and after that they don't.
        full_low = 0 if spec.window is None else pl.cdiv(jnp.maximum(position + count - spec.window, 0), block)
        full_low = jnp.clip(full_low, low, high)
        full_high = jnp.clip(lax.div(jnp.maximum(position + 1, 0), jnp.int32(block)), full_low, high)

        def fetch(source: Any, target: Any, full: Any, empty: Any, step: Any) -> None:
            """Starts the copies of block `step` once its buffer is free."""
            buffer = lax.rem(step, jnp.int32(stages))

            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(empty.at[buffer])

            for i in range(block // copy_slots):
                slot = (low + step) * block + i * copy_slots
                page = jnp.minimum(lax.div(slot, jnp.int32(spec.page_size)), spec.table - 1)
                index = ids[lax.div(page, jnp.int32(line)), lax.rem(page, jnp.int32(line))]
                place = pl.ds(lax.rem(slot, jnp.int32(spec.page_size)), copy_slots)
                plgpu.copy_gmem_to_smem(
                    source.at[index, head, place],
                    target.at[buffer, pl.ds(i * copy_slots, copy_slots)],
                    full.at[buffer],
                )

        def fetch_keys(step: Any) -> None:
            fetch(k, k_smem, barriers["k_full"], barriers["k_empty"], step)

        def fetch_values(step: Any) -> None:
            fetch(v, v_smem, barriers["v_full"], barriers["v_empty"], step)

        def fetch_later(fetch: Any, step: Any) -> None:
            pl.when((warpgroup == 0) & (step < high - low))(lambda: fetch(step))

        plgpu.copy_gmem_to_smem(
            q.at[tile, head, pl.ds(first_row, stored)],
            q_smem.at[warpgroup, pl.ds(0, stored)],
            barriers["q_full"].at[warpgroup],
        )

        @pl.when(warpgroup == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(tables.at[request], ids, barriers["ids_full"])
            plgpu.barrier_wait(barriers["ids_full"])
            for step in range(stages):
                fetch_later(fetch_keys, jnp.int32(step))
                fetch_later(fetch_values, jnp.int32(step))

        plgpu.barrier_wait(barriers["q_full"].at[warpgroup])
        slope = None if slopes is None else per_row(slopes.at[head, row_block]) * LOG2E

        def hide(buffer: Any, start: Any) -> None:
            """Zeros in values that no token of the tile sees: what is there may be NaN, and 0 · NaN is no 0."""

            @pl.when((warpgroup == 0) & ((start < first) | (start + block > end)))
            def _() -> None:
                for row in range(0, block, WARPGROUP_ROWS):
                    for column in range(0, Hv, WARPGROUP_ROWS):
                        values = v_smem.at[buffer, pl.ds(row, WARPGROUP_ROWS), pl.ds(column, WARPGROUP_ROWS)]
                        slot = indices((WARPGROUP_ROWS, WARPGROUP_ROWS), 0) + (start + row)
                        kept = plgpu.load(values, layout=plgpu.Layout.WGMMA, optimized=False)
                        values[...] = jnp.where((slot >= first) & (slot < end), kept, jnp.zeros_like(kept))
                plgpu.commit_smem()

            if warpgroups > 1:
                plgpu.barrier_arrive_and_wait(barriers["together"])

        def one_block(j: Array, state: tuple[Array, Array, Array], *, masked: bool) -> tuple[Array, Array, Array]:
            top, total, acc = state
            step = j - low
            buffer = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(barriers["k_full"].at[buffer])
            scores = product(q_smem.at[warpgroup], k_smem.at[buffer].T)
            plgpu.barrier_arrive(barriers["k_empty"].at[buffer])
            fetch_later(fetch_keys, step + stages)
            scores = _in_base_2(spec, scores)
            if slope is not None or masked:
                slot = indices(scores.shape, 1) + j * block
                token = position + lax.div(indices(scores.shape, 0) + first_row, jnp.int32(spec.group))
                if slope is not None:
                    scores -= spread(slope, scores.shape) * (token - slot).astype(jnp.float32)
                if masked:
                    seen = slot <= token
                    if spec.window is not None:
                        seen &= slot > token - spec.window
                    scores = jnp.where(seen, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(1))
            # A row that has seen no key yet keeps -inf; exp2(-inf - 0) is the 0 that it needs.
            finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            probs = jnp.exp2(scores - spread(finite, scores.shape))
            shrink = jnp.exp2(top - finite)
            total = total * shrink + probs.sum(1)
            acc = acc * spread(shrink, acc.shape)
            plgpu.barrier_wait(barriers["v_full"].at[buffer])
            if masked:
                hide(buffer, j * block)
            acc = accumulate(acc, probs.astype(dtype), v_smem.at[buffer])
            plgpu.barrier_arrive(barriers["v_empty"].at[buffer])
            fetch_later(fetch_values, step + stages)
            return new_top, total, acc

        top, total = constant((WARPGROUP_ROWS,), -jnp.inf), constant((WARPGROUP_ROWS,), 0.0)
        if sinks is not None:  # takes part once, whatever the parts
            top = per_row(sinks.at[head, row_block]) * LOG2E + jnp.where(part == 0, 0.0, -jnp.inf)
            total += jnp.where(part == 0, 1.0, 0.0)
        state = top, total, constant((WARPGROUP_ROWS, Hv), 0.0)
        for start, stop, masked in ((low, full_low, True), (full_low, full_high, False), (full_high, high, True)):
            if spec.window is None and start is low:
                continue
            state = lax.fori_loop(start, stop, lambda j, state, m=masked: one_block(j, state, masked=m), state)
        top, total, acc = state
        acc = acc * spread(jnp.where(total > 0, 1.0 / total, 0.0), acc.shape)
        if warpgroups > 1:  # the output takes the place of keys and values
            plgpu.barrier_arrive_and_wait(barriers["together"])
        out_smem[warpgroup] = acc.astype(out.dtype)
        lse_smem[warpgroup] = (top + jnp.log2(total)) / LOG2E
        plgpu.commit_smem()
        place = part, tile, head, pl.ds(first_row, stored)
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, pl.ds(0, stored)], out.at[place])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup, pl.ds(0, stored)], lse.at[place])
        plgpu.wait_smem_to_gmem(0)

    out_dtype = dtype if splits == 1 else jnp.float32
    out_smem = (warpgroups, WARPGROUP_ROWS, Hv)
    full = dict(num_arrivals=block // copy_slots, num_barriers=stages)
    empty = dict(num_arrivals=warpgroups, num_barriers=stages)
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((splits, tiles, K, padded, Hv), out_dtype),
            jax.ShapeDtypeStruct((splits, tiles, K, padded), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=matrices((warpgroups, WARPGROUP_ROWS, H), dtype),
            ids=plgpu.SMEM(tables.shape[1:], jnp.int32),
            lse_smem=plgpu.SMEM((warpgroups, WARPGROUP_ROWS), jnp.float32),
            buffers=plgpu.RefUnion(
                [matrices((stages, block, H), dtype), matrices((stages, block, Hv), dtype)],
                [matrices(out_smem, dtype) if splits == 1 else plgpu.SMEM(out_smem, jnp.float32)],
            ),
            q_full=plgpu.Barrier(num_barriers=warpgroups),
            ids_full=plgpu.Barrier(),
            k_full=plgpu.Barrier(**full),
            v_full=plgpu.Barrier(**full),
            k_empty=plgpu.Barrier(**empty),
            v_empty=plgpu.Barrier(**empty),
            together=plgpu.Barrier(num_arrivals=warpgroups),
        ),
        grid=(K, row_tiles, tiles, splits),
        grid_names=("heads", "rows", "tiles", "parts"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="llm_jax_ragged_paged_attention",
    )(q, pages.k, pages.v, slopes, sinks, meta, tables)
    return out[..., :rows, :], lse[..., :rows]


def _in_tiles(x: Float[Array, "K r"], count: int) -> Float[Array, "K count 64"]:
    """A number per row, by warpgroup; 0 for rows that are not there."""
    return jnp.pad(x, ((0, 0), (0, count * WARPGROUP_ROWS - x.shape[1]))).reshape(x.shape[0], count, WARPGROUP_ROWS)


def _in_base_2(spec: RaggedSpec, scores: Array) -> Array:
    """Scaled and capped, for exp2."""
    if spec.softcap is None:
        return scores * (spec.scale * LOG2E)
    return jnp.tanh(scores * (spec.scale / spec.softcap)) * (spec.softcap * LOG2E)
