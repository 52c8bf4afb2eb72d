"""Flash attention backward for TPUs: one kernel for the queries' gradient, one for that of keys and values.

Each adds up what is its own in vector memory, in the order of its schedule: no atomics, the same sums every time.
Both compute the probabilities again from the log-sum-exp, which is inf in a row that sees nothing. `delta` is, per row,
sum(out · d_out) - d_lse.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.flash_attention.bounds import Tiling
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, RowSums, alibi_bias
from llm_jax.kernels.flash_attention.tpu_blocks import Blocks, Extras, by_heads, by_length, extras, rows_by_heads
from llm_jax.kernels.flash_attention.tpu_schedule import FIRST, LAST, schedule
from llm_jax.kernels.flash_attention.tpu_tile import (
    LANES,
    LOG2_E,
    column,
    on_tile,
    row,
    tile_scores,
    widened,
)


class Saved(NamedTuple):
    """What both kernels read: arrays of the call, then in their layout, then references to blocks."""

    q: Float[Array, "B T N H"] | Any
    k: Float[Array, "B S K H"] | Any
    v: Float[Array, "B S K Hv"] | Any
    d_out: Float[Array, "B T N Hv"] | Any
    lse: Float[Array, "B T N"] | Any
    delta: Float[Array, "B T N"] | Any

    def in_layout(self, tiles: Tiling) -> "Saved":
        """Padded to whole blocks; queries that are not there have probabilities of exp(score - inf)."""
        q, d_out = (by_heads(x, tiles.q_padded) for x in (self.q, self.d_out))
        k, v = (by_heads(x, tiles.kv_padded) for x in (self.k, self.v))
        lse, delta = rows_by_heads(self.lse, tiles.q_padded, jnp.inf), rows_by_heads(self.delta, tiles.q_padded)
        return Saved(q, k, v, d_out, lse, delta)

    @staticmethod
    def specs(blocks: Blocks) -> "Saved":
        """Of the blocks."""
        H, Hv = blocks.spec.head_dim, blocks.spec.value_dim
        row = blocks.query_row()
        return Saved(blocks.queries(H), blocks.keys(H), blocks.keys(Hv), blocks.queries(Hv), row, row)


def queries_gradient(
    spec: AttentionSpec, tiles: Tiling, saved: Saved, slopes: Float[Array, " N"] | None, masks: MaskArrays
) -> tuple[Float[Array, "B T N H"], RowSums | None]:
    """Gradient of q, and with slopes or sinks sums for theirs."""
    blocks = Blocks(spec, tiles, schedule(spec, tiles, masks))
    plan, bq, bkv = blocks.plan, tiles.q_block, tiles.kv_block
    given = extras(blocks, masks, slopes, None)

    def kernel(steps: Any, saved: Saved, given: Extras, dq: Any, sums: Any, *state: Any) -> None:
        q, k, v, d_out, lse, delta = saved
        dq_sum, lse_column, delta_column, columns = state
        head = pl.program_id(1)
        step = plan.at(steps, pl.program_id(0), pl.program_id(2))

        @pl.when(step & FIRST != 0)
        def _():
            lse_column[...] = column(lse[...] * LOG2_E)
            delta_column[...] = column(delta[...])
            dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)
            for total in columns:
                total[...] = jnp.zeros(total.shape, jnp.float32)

        def body(masked: bool) -> None:
            scores = tile_scores(blocks, q[...], k[...], given, head, step, masked)
            probs = jnp.exp2(scores.final - widened(lse_column[...], bkv))
            d_probs = mosaic_tpu.dot(d_out[...], v[...], 1, 1)
            terms = [probs * d_probs] if columns else []
            if spec.alibi:
                biased = probs * alibi_bias(jnp.float32(1), scores.rows, scores.keys)
                terms += [biased * d_probs, biased]
            for total, term in zip(columns, terms, strict=True):
                total[...] += term.sum(1, keepdims=True)
            d_scores = probs * (d_probs - widened(delta_column[...], bkv))
            if scores.tanh is not None:
                d_scores = d_scores * (1.0 - scores.tanh**2)
            dq_sum[...] += mosaic_tpu.dot(d_scores.astype(k.dtype), k[...], 1, 0)

        on_tile(blocks, step, body)

        @pl.when(step & LAST != 0)
        def _():
            dq[...] = (dq_sum[...] * spec.scale).astype(dq.dtype)
            for one, total in zip(sums, columns, strict=True):
                one[...] = row(total[...])

    count = spec.row_sums
    statistic = pltpu.VMEM((bq, LANES), jnp.float32)
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=blocks.grid,
            in_specs=[Saved.specs(blocks), blocks.extras(given)],
            out_specs=[blocks.queries(spec.head_dim), [blocks.query_row()] * count],
            scratch_shapes=[
                pltpu.VMEM((bq, spec.head_dim), jnp.float32),
                statistic,
                statistic,
                [statistic] * count,
            ],
        ),
        out_shape=[
            manual_axes.like(saved.q, (spec.batch, spec.heads, tiles.q_padded, spec.head_dim), saved.q.dtype),
            [manual_axes.like(saved.q, (spec.batch, spec.heads, 1, tiles.q_padded), jnp.float32)] * count,
        ],
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary"),
        name="llm_jax_flash_attention_dq",
    )
    dq, sums = call(plan.steps, saved.in_layout(tiles), given)
    made = RowSums(*(x[:, :, 0].swapaxes(1, 2)[:, : spec.q_len] for x in sums)) if sums else None
    return by_length(dq, spec.q_len), made


def keys_gradient(
    spec: AttentionSpec, tiles: Tiling, saved: Saved, slopes: Float[Array, " N"] | None, masks: MaskArrays
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of k and v: each block of keys adds up over the blocks and the heads of the queries that see it.

    Tiles have the keys along the sublanes, so that both products take the probabilities as they are.
    """
    blocks = Blocks(spec, tiles, schedule(spec, tiles, masks, by_keys=True), by_keys=True)
    plan, bkv = blocks.plan, tiles.kv_block
    given = extras(blocks, masks, slopes, None)

    def kernel(steps: Any, saved: Saved, given: Extras, dk: Any, dv: Any, *state: Any) -> None:
        q, k, v, d_out, lse, delta = saved
        dk_sum, dv_sum = state
        member = pl.program_id(3)
        head = pl.program_id(1) * spec.group + member
        step = plan.at(steps, pl.program_id(0), pl.program_id(2))

        @pl.when((step & FIRST != 0) & (member == 0))
        def _():
            dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
            dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

        def body(masked: bool) -> None:
            scores = tile_scores(blocks, q[...], k[...], given, head, step, masked)
            probs = jnp.exp2(scores.final - lse[...] * LOG2_E)
            d_probs = mosaic_tpu.dot(v[...], d_out[...], 1, 1)
            d_scores = probs * (d_probs - delta[...])
            if scores.tanh is not None:
                d_scores = d_scores * (1.0 - scores.tanh**2)
            dv_sum[...] += mosaic_tpu.dot(probs.astype(d_out.dtype), d_out[...], 1, 0)
            dk_sum[...] += mosaic_tpu.dot(d_scores.astype(q.dtype), q[...], 1, 0)

        on_tile(blocks, step, body)

        @pl.when((step & LAST != 0) & (member == spec.group - 1))
        def _():
            dk[...] = (dk_sum[...] * spec.scale).astype(dk.dtype)
            dv[...] = dv_sum[...].astype(dv.dtype)

    widths = spec.head_dim, spec.value_dim
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=blocks.grid,
            in_specs=[Saved.specs(blocks), blocks.extras(given)],
            out_specs=[blocks.keys(width) for width in widths],
            scratch_shapes=[pltpu.VMEM((bkv, width), jnp.float32) for width in widths],
        ),
        out_shape=[
            manual_axes.like(saved.k, (spec.batch, spec.kv_heads, tiles.kv_padded, width), saved.k.dtype)
            for width in widths
        ],
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary", "arbitrary"),
        name="llm_jax_flash_attention_dkv",
    )
    dk, dv = call(plan.steps, saved.in_layout(tiles), given)
    return by_length(dk, spec.kv_len), by_length(dv, spec.kv_len)
