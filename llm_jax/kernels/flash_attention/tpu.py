"""Flash attention for TPUs (Mosaic): `tpu_forward` and `tpu_backward`, and the sizes of their tiles.

A grid visits the pairs of blocks in which something is visible and no others (`tpu_schedule`); a tile that is visible
as a whole is computed without a mask (`tpu_tile`). Pallas is imported when a kernel is traced, not before.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels.flash_attention.bounds import Tiling
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, RowSums
from llm_jax.kernels.flash_attention.tpu_schedule import blocks_of, schedule_refusal
from llm_jax.kernels.platform import tpu_refusal
from llm_jax.kernels.tiles import tiles

OP = "flash_attention"
WIDEST = 256
"""Head sizes beyond would need smaller tiles than any that was compiled."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Most queries and keys of a tile, for the forward pass, the queries' gradient and the keys' and values'."""

    q: int = 1024
    kv: int = 1024
    dq_q: int = 1024
    dq_kv: int = 1024
    dkv_q: int = 1024
    dkv_kv: int = 1024


def supports(spec: AttentionSpec, platform: str) -> str | None:
    """Runs everything but dropout, wide heads, and more blocks than scalar memory has room for. float16, which TPUs
    do not have, is computed in float32."""
    if (refusal := tpu_refusal(platform)) is not None:
        return refusal
    if spec.dropout:
        return "no attention dropout (dropout_rate); the reference has it"
    if max(spec.head_dim, spec.value_dim) > WIDEST:
        return f"head sizes up to {WIDEST}, not {spec.head_dim} and {spec.value_dim}"
    sizes = _tiles(spec)
    plans = ((sizes.forward, False), (sizes.dq, False), (sizes.dkv, True))
    return next((text for plan in plans if (text := schedule_refusal(spec, *plan)) is not None), None)


def held_bytes(spec: AttentionSpec, platform: str) -> int:
    """Scores do not leave the chip."""
    return 0


def forward(
    spec: AttentionSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    alibi_slopes: Float[Array, " N"] | None,
    sinks: Float[Array, " N"] | None,
    masks: MaskArrays,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output in q's dtype and float32 log-sum-exp."""
    from llm_jax.kernels.flash_attention import tpu_forward

    dtype = q.dtype
    q, k, v = (_computable(x) for x in (q, k, v))
    out, lse = tpu_forward.forward(spec, _tiles(spec).forward, q, k, v, alibi_slopes, sinks, masks)
    return out.astype(dtype), lse


def backward(
    spec: AttentionSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    alibi_slopes: Float[Array, " N"] | None,
    masks: MaskArrays,
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N Hv"],
    delta: Float[Array, "B T N"],
) -> tuple[Array, Array, Array, RowSums | None]:
    """Gradients of q, k and v, and sums for those of slopes and sinks.

    `lse`: inf in a row that sees nothing. `delta`: what softmax subtracts, sum(out · d_out) less the gradient of `lse`.
    """
    from llm_jax.kernels.flash_attention import tpu_backward

    dtype, sizes = q.dtype, _tiles(spec)
    q, k, v, d_out = (_computable(x) for x in (q, k, v, d_out))
    saved = tpu_backward.Saved(q, k, v, d_out, lse, delta)
    dq, sums = tpu_backward.queries_gradient(spec, sizes.dq, saved, alibi_slopes, masks)
    dk, dv = tpu_backward.keys_gradient(spec, sizes.dkv, saved, alibi_slopes, masks)
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), sums


@dataclasses.dataclass(frozen=True)
class _Tilings:
    forward: Tiling
    dq: Tiling
    dkv: Tiling


def _tiles(spec: AttentionSpec) -> _Tilings:
    shape = f"hd{spec.head_dim}" + (" causal" if spec.causal else "")
    default = Tiles() if spec.dtype == "bfloat16" else Tiles(512, 512, 512, 512, 512, 512)
    sizes = tiles(OP, "tpu", dtype=spec.dtype, shape=shape, default=default)
    return _Tilings(
        blocks_of(spec, sizes.q, sizes.kv),
        blocks_of(spec, sizes.dq_q, sizes.dq_kv),
        blocks_of(spec, sizes.dkv_q, sizes.dkv_kv),
    )


def _computable(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x
