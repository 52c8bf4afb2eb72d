"""Flash attention backward for TPUs: one kernel for the queries' gradient, one for that of keys and values.

Each adds up what is its own in vector memory, in the order of its schedule: no atomics, the same sums every time.
Both compute the probabilities again from the log-sum-exp. `delta` is, per row, sum(out · d_out) - d_lse.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from llm_jax.kernels.flash_attention import tpu_tile as tile
from llm_jax.kernels.flash_attention.bounds import Tiling
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, alibi_bias
from llm_jax.kernels.flash_attention.tpu_schedule import FIRST, LAST, MASKED, UNMASKED, inner, outer, schedule


def queries_gradient(
    spec: AttentionSpec,
    tiles: Tiling,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    delta: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, " N"] | None]:
    """Gradients of q and of the slopes (float32)."""
    plan = schedule(spec, tiles, masks)
    B, N, G, H, Hv = spec.batch, spec.heads, spec.group, spec.head_dim, spec.value_dim
    bq, bkv = tiles.q_block, tiles.kv_block
    given = tile.extras(spec, tiles, masks, slopes, None)

    def place(b: Any, n: Any, s: Any, steps: Any) -> tuple[Any, Any]:
        del n
        return b, plan.at(steps, b, s)

    def queries(b: Any, n: Any, s: Any, steps: Any) -> tuple[Any, ...]:
        return b, n, outer(plan.at(steps, b, s)), 0

    def query_rows(b: Any, n: Any, s: Any, steps: Any) -> tuple[Any, ...]:
        return b, n, 0, outer(plan.at(steps, b, s))

    def keys(b: Any, n: Any, s: Any, steps: Any) -> tuple[Any, ...]:
        return b, n // G, inner(plan.at(steps, b, s)), 0

    def kernel(
        steps: Any, q: Any, k: Any, v: Any, d_out: Any, lse: Any, delta: Any, given: tile.Extras, *outputs_and_scratch: Any
    ) -> None:
        dq, d_slopes, sum_, lse_columns, delta_columns, slope_sum = outputs_and_scratch
        head = pl.program_id(1)
        step = plan.at(steps, pl.program_id(0), pl.program_id(2))

        @pl.when(step & FIRST != 0)
        def _():
            lse_columns[...] = tile.repeated(tile.finite_base_2(lse[...]))
            delta_columns[...] = tile.repeated(delta[...])
            sum_[...] = jnp.zeros(sum_.shape, jnp.float32)
            if slope_sum is not None:
                slope_sum[...] = jnp.zeros(slope_sum.shape, jnp.float32)

        def add(masked: bool) -> None:
            scores = tile.tile_scores(spec, tiles, q[...], k[...], given, head, step, masked=masked)
            probs = jnp.exp2(scores.final - tile.widened(lse_columns[...], bkv))
            d_probs = tile.dot(d_out[...], v[...], 1, 1)
            d_scores = probs * (d_probs - tile.widened(delta_columns[...], bkv))
            keys = k[...]
            if masked and tile.may_hold_unseen(spec):
                d_scores = jnp.where(scores.seen, d_scores, 0.0)
                keys = tile.used(keys, probs)
            if slope_sum is not None:
                d_slopes = d_scores * alibi_bias(jnp.float32(1.0), scores.rows, scores.keys)
                slope_sum[...] += d_slopes.sum(1, keepdims=True)
            if scores.tanh is not None:
                d_scores = d_scores * (1.0 - scores.tanh**2)
            sum_[...] += tile.dot(d_scores, keys, 1, 0)

        pl.when(step & MASKED != 0)(lambda: add(True))
        pl.when(step & UNMASKED != 0)(lambda: add(False))

        @pl.when(step & LAST != 0)
        def _():
            dq[...] = (sum_[...] * spec.scale).astype(dq.dtype)
            if slope_sum is not None:
                d_slopes[...] = jnp.transpose(slope_sum[...])[:1]

    arrays = (
        tile.by_heads(q, tiles.q_padded),
        tile.by_heads(k, tiles.kv_padded),
        tile.by_heads(v, tiles.kv_padded),
        tile.by_heads(d_out, tiles.q_padded),
        tile.rows_by_heads(lse, tiles.q_padded),
        tile.rows_by_heads(delta, tiles.q_padded),
        given,
    )
    of_slopes = spec.alibi or None
    column = pltpu.VMEM((bq, tile.LANES), jnp.float32)
    row_spec = pl.BlockSpec((None, None, 1, bq), query_rows)
    dq, d_slopes = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, plan.count),
            in_specs=[
                pl.BlockSpec((None, None, bq, H), queries),
                pl.BlockSpec((None, None, bkv, H), keys),
                pl.BlockSpec((None, None, bkv, Hv), keys),
                pl.BlockSpec((None, None, bq, Hv), queries),
                row_spec,
                row_spec,
                tile.extras_specs(tiles, given, place),
            ],
            out_specs=[pl.BlockSpec((None, None, bq, H), queries), of_slopes and row_spec],
            scratch_shapes=[pltpu.VMEM((bq, H), jnp.float32), column, column, of_slopes and column],
        ),
        out_shape=[
            tile.result((B, N, tiles.q_padded, H), q.dtype, arrays),
            of_slopes and tile.result((B, N, 1, tiles.q_padded), jnp.float32, arrays),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tile.VMEM_LIMIT
        ),
        name="llm_jax_flash_attention_dq",
    )(plan.steps, *arrays)
    return dq.swapaxes(1, 2)[:, : spec.q_len], None if d_slopes is None else d_slopes.sum((0, 2, 3))


def keys_gradient(
    spec: AttentionSpec,
    tiles: Tiling,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    delta: Float[Array, "B T N"],
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients of k and v: each block of keys adds up over the blocks and the heads of the queries that see it.

    Tiles have the keys along the sublanes, so that both products take the probabilities as they are.
    """
    plan = schedule(spec, tiles, masks, by_keys=True)
    B, K, G, H, Hv = spec.batch, spec.kv_heads, spec.group, spec.head_dim, spec.value_dim
    bq, bkv = tiles.q_block, tiles.kv_block
    given = tile.extras(spec, tiles, masks, slopes, None, by_keys=True)

    def place(b: Any, n: Any, s: Any, g: Any, steps: Any) -> tuple[Any, Any]:
        del n, g
        return b, plan.at(steps, b, s)

    def queries(b: Any, n: Any, s: Any, g: Any, steps: Any) -> tuple[Any, ...]:
        return b, n * G + g, inner(plan.at(steps, b, s)), 0

    def query_rows(b: Any, n: Any, s: Any, g: Any, steps: Any) -> tuple[Any, ...]:
        return b, n * G + g, 0, inner(plan.at(steps, b, s))

    def keys(b: Any, n: Any, s: Any, g: Any, steps: Any) -> tuple[Any, ...]:
        del g
        return b, n, outer(plan.at(steps, b, s)), 0

    def kernel(
        steps: Any, q: Any, k: Any, v: Any, d_out: Any, lse: Any, delta: Any, given: tile.Extras, *outputs_and_scratch: Any
    ) -> None:
        dk, dv, k_sum, v_sum = outputs_and_scratch
        member = pl.program_id(3)
        head = pl.program_id(1) * G + member
        step = plan.at(steps, pl.program_id(0), pl.program_id(2))

        @pl.when((step & FIRST != 0) & (member == 0))
        def _():
            k_sum[...] = jnp.zeros(k_sum.shape, jnp.float32)
            v_sum[...] = jnp.zeros(v_sum.shape, jnp.float32)

        def add(masked: bool) -> None:
            scores = tile.tile_scores(spec, tiles, q[...], k[...], given, head, step, masked=masked, by_keys=True)
            probs = jnp.exp2(scores.final - tile.finite_base_2(lse[...]))
            d_probs = tile.dot(v[...], d_out[...], 1, 1)
            d_scores = probs * (d_probs - delta[...])
            queries, d_outs = q[...], d_out[...]
            if masked and tile.may_hold_unseen(spec):
                d_scores = jnp.where(scores.seen, d_scores, 0.0)
                queries, d_outs = tile.used(queries, probs), tile.used(d_outs, probs)
            if scores.tanh is not None:
                d_scores = d_scores * (1.0 - scores.tanh**2)
            v_sum[...] += tile.dot(probs, d_outs, 1, 0)
            k_sum[...] += tile.dot(d_scores, queries, 1, 0)

        pl.when(step & MASKED != 0)(lambda: add(True))
        pl.when(step & UNMASKED != 0)(lambda: add(False))

        @pl.when((step & LAST != 0) & (member == G - 1))
        def _():
            dk[...] = (k_sum[...] * spec.scale).astype(dk.dtype)
            dv[...] = v_sum[...].astype(dv.dtype)

    arrays = (
        tile.by_heads(q, tiles.q_padded),
        tile.by_heads(k, tiles.kv_padded),
        tile.by_heads(v, tiles.kv_padded),
        tile.by_heads(d_out, tiles.q_padded),
        tile.rows_by_heads(lse, tiles.q_padded),
        tile.rows_by_heads(delta, tiles.q_padded),
        given,
    )
    row_spec = pl.BlockSpec((None, None, 1, bq), query_rows)
    k_spec, v_spec = (pl.BlockSpec((None, None, bkv, size), keys) for size in (H, Hv))
    dk, dv = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, plan.count, G),
            in_specs=[
                pl.BlockSpec((None, None, bq, H), queries),
                k_spec,
                v_spec,
                pl.BlockSpec((None, None, bq, Hv), queries),
                row_spec,
                row_spec,
                tile.extras_specs(tiles, given, place, by_keys=True),
            ],
            out_specs=[k_spec, v_spec],
            scratch_shapes=[pltpu.VMEM((bkv, H), jnp.float32), pltpu.VMEM((bkv, Hv), jnp.float32)],
        ),
        out_shape=[
            tile.result((B, K, tiles.kv_padded, H), k.dtype, arrays),
            tile.result((B, K, tiles.kv_padded, Hv), v.dtype, arrays),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tile.VMEM_LIMIT
        ),
        name="llm_jax_flash_attention_dkv",
    )(plan.steps, *arrays)
    return tuple(x.swapaxes(1, 2)[:, : spec.kv_len] for x in (dk, dv))
