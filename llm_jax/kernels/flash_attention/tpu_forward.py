"""Flash attention forward for TPUs: online softmax over the tiles of a schedule."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.flash_attention.bounds import Tiling
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays
from llm_jax.kernels.flash_attention.tpu_blocks import Blocks, Extras, by_heads, by_length, extras
from llm_jax.kernels.flash_attention.tpu_schedule import FIRST, LAST, schedule
from llm_jax.kernels.flash_attention.tpu_tile import (
    LANES,
    LOG2_E,
    on_tile,
    row,
    tile_scores,
    widened,
)


def forward(
    spec: AttentionSpec,
    tiles: Tiling,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    slopes: Float[Array, " N"] | None,
    sinks: Float[Array, " N"] | None,
    masks: MaskArrays,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output in q's dtype and float32 log-sum-exp."""
    blocks = Blocks(spec, tiles, schedule(spec, tiles, masks))
    plan, bq, bkv = blocks.plan, tiles.q_block, tiles.kv_block
    B, N, H, Hv = spec.batch, spec.heads, spec.head_dim, spec.value_dim
    given = extras(blocks, masks, slopes, sinks)

    def kernel(steps: Any, q: Any, k: Any, v: Any, given: Extras, out: Any, lse: Any, *state: Any) -> None:
        top, total, values = state
        head = pl.program_id(1)
        step = plan.at(steps, pl.program_id(0), pl.program_id(2))

        @pl.when(step & FIRST != 0)
        def _():
            # A sink is a key that has been seen already, without a value.
            start = -jnp.inf if given.sinks is None else given.sinks[head] * LOG2_E
            top[...] = jnp.full(top.shape, start, jnp.float32)
            total[...] = jnp.full(total.shape, 0.0 if given.sinks is None else 1.0, jnp.float32)
            values[...] = jnp.zeros(values.shape, jnp.float32)

        def body(masked: bool) -> None:
            scores = tile_scores(blocks, q[...], k[...], given, head, step, masked).final
            old = top[...]
            new = jnp.maximum(old, scores.max(1, keepdims=True))
            # A row that has seen no key yet keeps -inf; 2^(-inf - 0) is the 0 that it needs.
            finite = jnp.where(new == -jnp.inf, 0.0, new)
            probs = jnp.exp2(scores - widened(finite, bkv))
            shrink = jnp.exp2(old - finite)
            top[...] = new
            total[...] = total[...] * shrink + probs.sum(1, keepdims=True)
            values[...] = values[...] * widened(shrink, Hv) + mosaic_tpu.dot(probs.astype(v.dtype), v[...], 1, 0)

        on_tile(blocks, step, body)

        @pl.when(step & LAST != 0)
        def _():
            inverse = jnp.where(total[...] > 0, 1.0 / total[...], 0.0)
            out[...] = (values[...] * widened(inverse, Hv)).astype(out.dtype)
            lse[...] = row(top[...] + jnp.log2(total[...])) / LOG2_E

    statistic = pltpu.VMEM((bq, LANES), jnp.float32)
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=blocks.grid,
            in_specs=[blocks.queries(H), blocks.keys(H), blocks.keys(Hv), blocks.extras(given)],
            out_specs=[blocks.queries(Hv), blocks.query_row()],
            scratch_shapes=[statistic, statistic, pltpu.VMEM((bq, Hv), jnp.float32)],
        ),
        out_shape=[
            manual_axes.like(q, (B, N, tiles.q_padded, Hv), q.dtype),
            manual_axes.like(q, (B, N, 1, tiles.q_padded), jnp.float32),
        ],
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary"),
        name="llm_jax_flash_attention_forward",
    )
    k, v = (by_heads(x, tiles.kv_padded) for x in (k, v))
    out, lse = call(plan.steps, by_heads(q, tiles.q_padded), k, v, given)
    return by_length(out, spec.q_len), lse[:, :, 0].swapaxes(1, 2)[:, : spec.q_len]
