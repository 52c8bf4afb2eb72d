"""Flash attention forward for TPUs: online softmax over the tiles of a schedule."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from llm_jax.kernels.flash_attention import tpu_tile as tile
from llm_jax.kernels.flash_attention.bounds import Tiling
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays
from llm_jax.kernels.flash_attention.tpu_schedule import FIRST, LAST, MASKED, UNMASKED, inner, outer, schedule


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
    plan = schedule(spec, tiles, masks)
    B, N, G, H, Hv = spec.batch, spec.heads, spec.group, spec.head_dim, spec.value_dim
    bq, bkv = tiles.q_block, tiles.kv_block
    given = tile.extras(spec, tiles, masks, slopes, sinks)

    def place(b: Any, n: Any, s: Any, steps: Any) -> tuple[Any, Any]:
        del n
        return b, plan.at(steps, b, s)

    def queries(b: Any, n: Any, s: Any, steps: Any) -> tuple[Any, ...]:
        return b, n, outer(plan.at(steps, b, s)), 0

    def query_rows(b: Any, n: Any, s: Any, steps: Any) -> tuple[Any, ...]:
        return b, n, 0, outer(plan.at(steps, b, s))

    def keys(b: Any, n: Any, s: Any, steps: Any) -> tuple[Any, ...]:
        return b, n // G, inner(plan.at(steps, b, s)), 0

    def kernel(steps: Any, q: Any, k: Any, v: Any, given: tile.Extras, out: Any, lse: Any, top: Any, total: Any, sum_: Any):
        head = pl.program_id(1)
        step = plan.at(steps, pl.program_id(0), pl.program_id(2))

        @pl.when(step & FIRST != 0)
        def _():
            # A sink is a key that has been seen already, without a value.
            start = -jnp.inf if given.sinks is None else given.sinks[head] * tile.LOG2_E
            top[...] = jnp.full(top.shape, start, jnp.float32)
            total[...] = jnp.full(total.shape, 0.0 if given.sinks is None else 1.0, jnp.float32)
            sum_[...] = jnp.zeros(sum_.shape, jnp.float32)

        def add(masked: bool) -> None:
            scores = tile.tile_scores(spec, tiles, q[...], k[...], given, head, step, masked=masked).final
            old = top[...]
            new = jnp.maximum(old, scores.max(1, keepdims=True))
            # A row that has seen no key yet keeps -inf; 2^(-inf - 0) is the 0 that it needs.
            finite = jnp.where(new == -jnp.inf, 0.0, new)
            probs = jnp.exp2(scores - tile.widened(finite, bkv))
            shrink = jnp.exp2(old - finite)
            top[...] = new
            total[...] = total[...] * shrink + probs.sum(1, keepdims=True)
            values = tile.used(v[...], probs) if masked and tile.may_hold_unseen(spec) else v[...]
            sum_[...] = sum_[...] * tile.widened(shrink, Hv) + tile.dot(probs, values, 1, 0)

        pl.when(step & MASKED != 0)(lambda: add(True))
        pl.when(step & UNMASKED != 0)(lambda: add(False))

        @pl.when(step & LAST != 0)
        def _():
            all_ = total[...]
            inverse = jnp.where(all_ > 0, 1.0 / all_, 0.0)
            out[...] = (sum_[...] * tile.widened(inverse, Hv)).astype(out.dtype)
            lse[...] = jnp.transpose(top[...] + jnp.log2(all_))[:1] / tile.LOG2_E

    arrays = (
        tile.by_heads(q, tiles.q_padded),
        tile.by_heads(k, tiles.kv_padded),
        tile.by_heads(v, tiles.kv_padded),
        given,
    )
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, plan.count),
            in_specs=[
                pl.BlockSpec((None, None, bq, H), queries),
                pl.BlockSpec((None, None, bkv, H), keys),
                pl.BlockSpec((None, None, bkv, Hv), keys),
                tile.extras_specs(tiles, given, place),
            ],
            out_specs=[
                pl.BlockSpec((None, None, bq, Hv), queries),
                pl.BlockSpec((None, None, 1, bq), query_rows),
            ],
            scratch_shapes=[
                pltpu.VMEM((bq, tile.LANES), jnp.float32),
                pltpu.VMEM((bq, tile.LANES), jnp.float32),
                pltpu.VMEM((bq, Hv), jnp.float32),
            ],
        ),
        out_shape=[
            tile.result((B, N, tiles.q_padded, Hv), q.dtype, arrays),
            tile.result((B, N, 1, tiles.q_padded), jnp.float32, arrays),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tile.VMEM_LIMIT
        ),
        name="llm_jax_flash_attention_forward",
    )(plan.steps, *arrays)
    return out.swapaxes(1, 2)[:, : spec.q_len], lse[:, :, 0].swapaxes(1, 2)[:, : spec.q_len]
