"""Gradients of keys and values on Hopper: one tile of keys, over the blocks of queries of all heads that read it.

Everything is transposed (keys along the rows of a tile of scores), so that probabilities and their gradients go from
registers into the products. The sum over a group's heads is part of the loop: in a fixed order, without atomics.
Two warpgroups, each with its own keys; the first one fetches. Above head size 128 the two gradients of 64 keys do not
fit into one warpgroup's registers: there both compute all scores of the same 64 keys, and each sums half the columns.
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
    accumulate_both,
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
from llm_jax.kernels.mosaic_gpu_values import again, constant


def dkv(
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
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of keys and values. `bounds` are `section_bounds` of the keys; the rest as for `dq`."""
    rows, q_block, stages, panels = tiles.dkv_kv_block, tiles.dkv_q_block, tiles.dkv_stages, tiles.dkv_panels
    owners = WARPGROUPS // panels
    H, Hv, dtype = q.shape[3] // panels, v.shape[3] // panels, q.dtype

    def kernel(
        q,
        k,
        v,
        slopes,
        masks,
        bounds,
        d_out,
        statistics,
        dk,
        dv,
        *,
        k_smem,
        v_smem,
        q_smem,
        o_smem,
        lse_smem,
        delta_smem,
        **barriers,
    ):
        ends = masked_ends(spec, of="keys", kv_block=rows)
        batch, kv_head, warpgroup = lax.axis_index("batch"), lax.axis_index("kv_heads"), lax.axis_index("warpgroup")
        kv_tile = lax.axis_index("kv_tiles")
        low, full_low, full_high, high = read_bounds(bounds, batch, kv_tile)
        steps = (high - low) * spec.group

        def place_of(warpgroup: Any) -> tuple[Any, Any]:
            return lax.div(warpgroup, jnp.int32(panels)), lax.rem(warpgroup, jnp.int32(panels))

        owner, panel = place_of(warpgroup)

        def keys_of(owner: Any, kv_tile: Any = kv_tile) -> Any:
            return batch, pl.ds((kv_tile * owners + owner) * rows, rows), kv_head

        def columns(panel: Any, size: int) -> Any:
            return pl.ds(panel * size, size)

        def following(g: Any, j: Any) -> tuple[Any, Any]:
            """The next block of queries: of this head, or the first one of the next head."""
            last = j + 1 >= high
            return g + last.astype(jnp.int32), jnp.where(last, low, j + 1)

        def first(step: int) -> tuple[Any, Any]:
            return (jnp.int32(0), low) if step == 0 else following(*first(step - 1))

        def queries(j: Any) -> Any:
            return pl.ds(j * q_block, q_block)

        def blocks(ref: Any, panel: int, size: int) -> Any:
            return lambda g, j: ref.at[batch, queries(j), kv_head * spec.group + g, columns(panel, size)]

        def vectors(which: int) -> Any:
            return lambda g, j: statistics.at[batch, kv_head * spec.group + g, which, queries(j)]

        parts = (
            *((blocks(q, i, H), q_smem.at[i]) for i in range(panels)),
            *((blocks(d_out, i, Hv), o_smem.at[i]) for i in range(panels)),
            (vectors(0), lse_smem),
            (vectors(1), delta_smem),
        )
        stream = Stream(stages, parts, barriers["full"], barriers["empty"])

        @pl.when(warpgroup == 0)
        def _() -> None:
            for i in range(owners):
                for j in range(panels):
                    for ref, buffer, size in ((k, k_smem, H), (v, v_smem, Hv)):
                        source = ref.at[*keys_of(i), columns(j, size)]
                        plgpu.copy_gmem_to_smem(source, buffer.at[i, j], barriers["kv_full"])
            stream.start(steps, first)

        plgpu.barrier_wait(barriers["kv_full"])
        kv_start = (kv_tile * owners + owner) * rows

        def head(g: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            scores = Scores(spec, None if slopes is None else slopes[kv_head * spec.group + g])

            def block(j: Array, state: tuple[Array, Array], *, masked: bool) -> tuple[Array, Array]:
                step = g * (high - low) + j - low
                shape = (rows, q_block)
                tile = Tile(spec, masks, batch, j * q_block, kv_start, shape, q_axis=1)
                pl.when(warpgroup == 0)(lambda: stream.advance(step, step + 1 < steps, *following(g, j)))
                stream.wait(step)
                slot = stream.slot(step)

                def probabilities(raw: Array) -> tuple[Array, Array]:
                    """For the sum of values, in 16 bits; and for d logits, times the slope of the cap."""
                    my_lse = spread(load(lse_smem.at[slot], 1), shape, 1)
                    probs, slope = scores.probabilities(raw, tile, my_lse, masked=masked)
                    if slope is None:
                        return probs.astype(dtype), probs
                    return lax.optimization_barrier((probs.astype(dtype), probs * slope))

                same_owner = again(owner)

                def both(mine: Any, buffers: Any) -> Any:
                    return [(mine.at[same_owner, i], buffers.at[i, slot].T) for i in range(panels)]

                (probs, weights), d_probs = two_products(both(k_smem, q_smem), both(v_smem, o_smem), probabilities)

                def d_logits() -> Array:
                    return (weights * (d_probs - spread(load(delta_smem.at[slot], 1), shape, 1))).astype(dtype)

                dk, dv = state
                dv, dk = accumulate_both(
                    (dv, dk), ((probs, o_smem.at[panel, slot]), (d_logits, q_smem.at[panel, slot]))
                )
                stream.release(step)
                return dk, dv

            return sections((low, full_low, full_high, high), ends, block, state)

        state = constant((rows, H), 0.0), constant((rows, Hv), 0.0)
        d_keys, d_values = lax.fori_loop(0, spec.group, head, state)
        plgpu.barrier_arrive_and_wait(barriers["done"])  # the other one may still read the keys that are overwritten
        place = owner, panel = place_of(again(warpgroup))
        keys_mine = keys_of(owner, again(kv_tile))
        d_keys_mine, d_values_mine = k_smem.at[*place], v_smem.at[*place]
        d_keys_mine[...] = (d_keys * spec.scale).astype(dtype)
        d_values_mine[...] = d_values.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_keys_mine, dk.at[*keys_mine, columns(panel, H)])
        plgpu.copy_smem_to_gmem(d_values_mine, dv.at[*keys_mine, columns(panel, Hv)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        scratch_types=dict(
            k_smem=matrices((owners, panels, rows, H), dtype, summed=q_block),
            v_smem=matrices((owners, panels, rows, Hv), dtype, summed=q_block),
            q_smem=matrices((panels, stages, q_block, H), dtype, summed=q_block),
            o_smem=matrices((panels, stages, q_block, Hv), dtype, summed=q_block),
            lse_smem=plgpu.SMEM((stages, q_block), jnp.float32),
            delta_smem=plgpu.SMEM((stages, q_block), jnp.float32),
            kv_full=plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
            full=plgpu.Barrier(num_arrivals=2 * panels + 2, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            done=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(spec.kv_heads, bounds.shape[1], spec.batch),
        grid_names=("kv_heads", "kv_tiles", "batch"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="llm_jax_flash_attention_dkv",
    )(q, k, v, slopes, masks, bounds, d_out, statistics)
