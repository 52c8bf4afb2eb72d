"""One tile of queries and one key head per block of threads, or a part of its keys; pages come by TMA.

A tile has 64 rows for each warpgroup, of which a decoding request fills as many as its group has heads: reading the
keys takes longer than multiplying with empty rows. The first warpgroup starts the copies, one per page, as many blocks
ahead as there are buffers. Page ids lie in shared memory. Packed numbers are written out there in 16 bits; their scales
are multiplied with scores and probabilities. Values of latent pages have too many columns for one warpgroup's
registers: there two have the same rows, and half of the columns each.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from llm_jax.kernels.mosaic_gpu import matrices
from llm_jax.kernels.mosaic_gpu_values import (
    LOG2E,
    accumulate,
    again,
    constant,
    indices,
    per_column,
    per_row,
    plgpu,
    product,
    spread,
)
from llm_jax.kernels.ragged_paged_attention.gpu import WARPGROUP_ROWS, Sizes, num_warpgroups
from llm_jax.kernels.ragged_paged_attention.pages import Pages
from llm_jax.kernels.ragged_paged_attention.spec import RaggedSpec
from llm_jax.kernels.ragged_paged_attention.work import Tiles

WIDE = 128
"""Columns of values beyond which all blocks go through one loop: further copies of it take scarce registers."""
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
    tiles, K, rows, H = q.shape
    dtype, block, stages, warpgroups = q.dtype, sizes.block, sizes.stages, num_warpgroups(spec, rows)
    panels = 2 if spec.latent else 1  # warpgroups that have the same rows, and other columns of the values
    columns, row_groups = spec.value_dim // panels, warpgroups // panels
    unit = STORED_ROWS if rows <= WARPGROUP_ROWS else row_groups * WARPGROUP_ROWS
    padded = -(-rows // unit) * unit
    row_tiles = -(-padded // (row_groups * WARPGROUP_ROWS))
    stored = min(padded, WARPGROUP_ROWS)
    """Rows of a warpgroup that are loaded and stored."""
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    slopes, sinks = (None if x is None else _in_tiles(x, row_tiles * row_groups) for x in (slopes, sinks))
    meta = jnp.stack([work.request, work.count, work.position, work.first, work.end], axis=1)
    line = min(COPIED, -(-spec.table // 4) * 4)  # TMA takes multiples of 16 bytes
    tables = jnp.pad(page_tables, ((0, 0), (0, -spec.table % line))).reshape(spec.requests, -1, line)
    copy_slots = math.gcd(block, spec.page_size)

    def kernel(
        q, k, v, k_scales, v_scales, slopes, sinks, meta, tables, out, lse, *, q_smem, ids, lse_smem, buffers,
        k_scales_smem, v_scales_smem, **barriers
    ):  # fmt: skip
        (k_smem, v_smem, k_unpacked, v_unpacked), (out_smem,) = buffers
        v_smem = k_smem if spec.latent else v_smem
        part, tile, head = lax.axis_index("parts"), lax.axis_index("tiles"), lax.axis_index("heads")
        warpgroup = lax.axis_index("warpgroup")
        request, count, position, first, end = (meta[tile, i] for i in range(5))
        row_group = lax.div(warpgroup, jnp.int32(panels))
        row_block = lax.axis_index("rows") * row_groups + row_group
        first_row = row_block * WARPGROUP_ROWS

        low, high = lax.div(first, jnp.int32(block)), pl.cdiv(end, jnp.int32(block))
        share = pl.cdiv(high - low, jnp.int32(splits))
        low = jnp.minimum(low + part * share, high)
        high = jnp.minimum(low + share, high)
        # Blocks that all tokens see whole, and those before and after that they don't.
        full_low = 0 if spec.window is None else pl.cdiv(jnp.maximum(position + count - spec.window, 0), block)
        full_low = jnp.clip(full_low, low, high)
        full_high = jnp.clip(lax.div(jnp.maximum(position + 1, 0), jnp.int32(block)), full_low, high)

        def fetch(pairs: tuple[tuple[Any, Any], ...], full: Any, empty: Any, step: Any) -> None:
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
                for source, target in pairs:
                    if source is not None:
                        piece = target.at[buffer, pl.ds(i * copy_slots, copy_slots)]
                        # Copies of a shape need multiples of 128 bytes in shared memory, which 16 scales are not;
                        # copies of so many bytes multiples of 16. These are made where nothing fills what is outside.
                        outside = plgpu.OOBFillMode.UNDEFINED if len(source.shape) == 3 else None
                        plgpu.copy_gmem_to_smem(source.at[index, head, place], piece, full.at[buffer], oob_mode=outside)

        def fetch_keys(step: Any) -> None:
            fetch(((k, k_smem), (k_scales, k_scales_smem)), barriers["k_full"], barriers["k_empty"], step)

        def fetch_values(step: Any) -> None:
            fetch(((v, v_smem), (v_scales, v_scales_smem)), barriers["v_full"], barriers["v_empty"], step)

        def fetch_later(fetch: Any, step: Any) -> None:
            pl.when((warpgroup == 0) & (step < high - low))(lambda: fetch(step))

        queries = q_smem.at[row_group]

        @pl.when(lax.rem(warpgroup, jnp.int32(panels)) == 0)
        def _() -> None:
            rows_of_group = q.at[tile, head, pl.ds(first_row, stored)]
            plgpu.copy_gmem_to_smem(rows_of_group, queries.at[pl.ds(0, stored)], barriers["q_full"].at[row_group])

        @pl.when(warpgroup == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(tables.at[request], ids, barriers["ids_full"])
            plgpu.barrier_wait(barriers["ids_full"])
            for step in range(stages):
                fetch_later(fetch_keys, jnp.int32(step))
                if not spec.latent:
                    fetch_later(fetch_values, jnp.int32(step))

        plgpu.barrier_wait(barriers["q_full"].at[row_group])
        slope = None if slopes is None else per_row(slopes.at[head, row_block]) * LOG2E

        def rewrite(source: Any, target: Any, start: Any, *, hide: bool) -> None:
            """Numbers of a block of slots, from `start` on, in 16 bits to `target`; with `hide` zeros for slots that no
            token of the tile sees: what is there may be NaN, and 0 · NaN is no 0. Ends with all warpgroups ready."""
            for i, (row, column) in enumerate(itertools.product(range(0, block, 64), range(0, source.shape[1], 64))):

                @pl.when(warpgroup == i % warpgroups)
                def _(row: int = row, column: int = column) -> None:
                    piece = pl.ds(row, 64), pl.ds(column, 64)
                    numbers = plgpu.load(source.at[piece], layout=plgpu.Layout.WGMMA, optimized=False)
                    numbers = _in_16_bits(numbers, dtype)
                    if hide:
                        slot = indices((64, 64), 0) + (start + row)
                        numbers = jnp.where((slot >= first) & (slot < end), numbers, jnp.zeros_like(numbers))
                    target[piece] = numbers

            plgpu.commit_smem()
            if warpgroups > 1:
                plgpu.barrier_arrive_and_wait(barriers["together"])

        def step_of(j: Array, state: Any, *, masked: bool, panel: int) -> tuple[Array, Array, Array]:
            top, total, acc = state
            step = j - low
            buffer, start = lax.rem(step, jnp.int32(stages)), j * block
            plgpu.barrier_wait(barriers["k_full"].at[buffer])
            keys, scales = k_smem.at[buffer], None
            if spec.packed:
                if spec.latent:  # the block before has been multiplied by all
                    plgpu.barrier_arrive_and_wait(barriers["together"])
                rewrite(keys, k_unpacked, start, hide=spec.latent and masked)
                keys, scales = k_unpacked, per_column(k_scales_smem.at[buffer])
            elif spec.latent and masked:
                pl.when((start < first) | (start + block > end))(lambda: rewrite(keys, keys, start, hide=True))
            scores = product(q_smem.at[again(row_group)], keys.T)
            if not spec.latent:
                plgpu.barrier_arrive(barriers["k_empty"].at[buffer])
                fetch_later(fetch_keys, step + stages)
            if scales is not None:
                scores *= spread(scales, scores.shape, axis=1)
            scores, seen = logits(scores, start, masked)
            new_top = jnp.maximum(top, scores.max(1))
            # A row that has seen no key yet keeps -inf; exp2(-inf - 0) is the 0 that it needs.
            finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            probs = jnp.exp2(scores - spread(finite, scores.shape))
            shrink = jnp.exp2(top - finite)
            total = total * shrink + probs.sum(1)
            acc = acc * spread(shrink, acc.shape)
            if spec.latent:
                values = keys.at[:, pl.ds(panel * columns, columns)]
            else:
                plgpu.barrier_wait(barriers["v_full"].at[buffer])
                values = v_smem.at[buffer]
                if spec.packed:
                    rewrite(values, v_unpacked, start, hide=masked)
                    values, scales = v_unpacked, per_column(v_scales_smem.at[buffer])
                elif masked:
                    pl.when((start < first) | (start + block > end))(lambda: rewrite(values, values, start, hide=True))
            if scales is not None:
                probs *= spread(scales, probs.shape, axis=1)
                if seen is not None:  # a scale may be NaN too
                    probs = jnp.where(seen, probs, 0.0)
            acc = accumulate(acc, probs.astype(dtype), values)
            plgpu.barrier_arrive(barriers["k_empty" if spec.latent else "v_empty"].at[buffer])
            fetch_later(fetch_keys if spec.latent else fetch_values, step + stages)
            return new_top, total, acc

        def logits(scores: Array, start: Any, masked: bool) -> tuple[Array, Array | None]:
            """Scores as they go into the softmax, in base 2, and which of them count where that is asked for."""
            scores = _in_base_2(spec, scores)
            if slope is None and not masked:
                return scores, None
            slot = indices(scores.shape, 1) + start
            token = position + lax.div(indices(scores.shape, 0) + first_row, jnp.int32(spec.group))
            if slope is not None:
                scores -= spread(slope, scores.shape) * (token - slot).astype(jnp.float32)
            if not masked:
                return scores, None
            seen = slot <= token
            if spec.window is not None:
                seen &= slot > token - spec.window
            return jnp.where(seen, scores, -jnp.inf), seen

        def compute(panel: int) -> None:
            top, total = constant((WARPGROUP_ROWS,), -jnp.inf), constant((WARPGROUP_ROWS,), 0.0)
            if sinks is not None:  # takes part once, whatever the parts
                top = per_row(sinks.at[head, row_block]) * LOG2E + jnp.where(part == 0, 0.0, -jnp.inf)
                total += jnp.where(part == 0, 1.0, 0.0)
            state = top, total, constant((WARPGROUP_ROWS, columns), 0.0)
            sections = ((low, full_low, True), (full_low, full_high, False), (full_high, high, True))
            sections = sections[spec.window is None :]
            if columns > WIDE:
                sections = ((low, high, True),)
            for start, stop, masked in sections:
                body = functools.partial(step_of, masked=masked, panel=panel)
                state = lax.fori_loop(start, stop, body, state)
            top, total, acc = state
            acc = acc * spread(jnp.where(total > 0, 1.0 / total, 0.0), acc.shape)
            if warpgroups > 1:  # the output takes the place of keys and values
                plgpu.barrier_arrive_and_wait(barriers["together"])
            mine = row_group if panels == 1 else panel
            out_smem[mine] = acc.astype(out.dtype)
            lse_smem[mine] = (top + jnp.log2(total)) / LOG2E
            plgpu.commit_smem()
            place = part, tile, head, pl.ds(first_row, stored)
            piece = out.at[(*place, pl.ds(panel * columns, columns))]
            plgpu.copy_smem_to_gmem(out_smem.at[mine, pl.ds(0, stored)], piece)
            if panel == 0:
                plgpu.copy_smem_to_gmem(lse_smem.at[mine, pl.ds(0, stored)], lse.at[place])
            plgpu.wait_smem_to_gmem(0)

        if panels == 1:
            compute(0)
        else:
            for panel in range(panels):
                pl.when(warpgroup == panel)(functools.partial(compute, panel))

    out_dtype = dtype if splits == 1 else jnp.float32
    out_smem = (warpgroups, WARPGROUP_ROWS, columns)
    unpacked = (lambda *shape: matrices(shape, dtype)) if spec.packed else lambda *_: None
    scales = plgpu.SMEM((stages, block), jnp.float32) if spec.packed else None
    kept = (lambda *shape: plgpu.SMEM(shape, pages.k.dtype)) if spec.packed else lambda *shape: matrices(shape, dtype)
    full: dict[str, Any] = dict(num_arrivals=block // copy_slots * (2 if spec.packed else 1), num_barriers=stages)
    empty: dict[str, Any] = dict(num_arrivals=warpgroups, num_barriers=stages)
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((splits, tiles, K, padded, spec.value_dim), out_dtype),
            jax.ShapeDtypeStruct((splits, tiles, K, padded), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=matrices((row_groups, WARPGROUP_ROWS, H), dtype),
            ids=plgpu.SMEM(tables.shape[1:], jnp.int32),
            lse_smem=plgpu.SMEM((warpgroups, WARPGROUP_ROWS), jnp.float32),
            buffers=plgpu.RefUnion(
                [
                    kept(stages, block, H),
                    None if spec.latent else kept(stages, block, spec.value_dim),
                    unpacked(block, H),
                    None if spec.latent else unpacked(block, spec.value_dim),
                ],
                [matrices(out_smem, dtype) if splits == 1 else plgpu.SMEM(out_smem, jnp.float32)],
            ),
            k_scales_smem=scales,
            v_scales_smem=None if spec.latent else scales,
            q_full=plgpu.Barrier(num_barriers=row_groups),
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
    )(q, pages.k, pages.v, pages.k_scales, pages.v_scales, slopes, sinks, meta, tables)
    return out[..., :rows, :], lse[..., :rows]


def _in_tiles(x: Float[Array, "K r"], count: int) -> Float[Array, "K count 64"]:
    """A number per row, by warpgroup; 0 for rows that are not there."""
    return jnp.pad(x, ((0, 0), (0, count * WARPGROUP_ROWS - x.shape[1]))).reshape(x.shape[0], count, WARPGROUP_ROWS)


def _in_16_bits(x: Array, dtype: Any) -> Array:
    """int8 is exact in both 16-bit types; float8 comes by way of float16, as the hardware converts it."""
    if x.dtype in (dtype, jnp.int8):
        return x.astype(dtype)
    x = x.astype(jnp.float16)
    return x if dtype == jnp.float16 else x.astype(jnp.float32).astype(dtype)


def _in_base_2(spec: RaggedSpec, scores: Array) -> Array:
    """Scaled and capped, for exp2."""
    if spec.softcap is None:
        return scores * (spec.scale * LOG2E)
    return jnp.tanh(scores * (spec.scale / spec.softcap)) * (spec.softcap * LOG2E)
