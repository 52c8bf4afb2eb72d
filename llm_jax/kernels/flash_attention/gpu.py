"""Attention on Hopper GPUs (sm_90a): TMA, wgmma and warp specialization, by Pallas' Mosaic GPU.

Outside the kernels, head sizes are padded to a multiple of 32, and lengths to one of 8. Pallas is imported when a
kernel is traced, not before.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels import manual_axes
from llm_jax.kernels.flash_attention.bounds import Tiling, pad_masks, section_bounds
from llm_jax.kernels.flash_attention.gpu_tiles import WARPGROUPS, backward_tiles, forward_tiles
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, RowSums
from llm_jax.kernels.platform import hopper_refusal
from llm_jax.kernels.tiles import tiles


def supports(spec: AttentionSpec, platform: str) -> str | None:
    """bfloat16 and float16 on Hopper, head sizes to 256, no dropout."""
    if (reason := hopper_refusal(platform)) is not None:
        return reason
    if 0 in (spec.batch, spec.q_len, spec.kv_len):
        return "no queries or no keys"
    if spec.dropout:
        return "no attention dropout (dropout_rate); the reference has it"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"tensor cores take bfloat16 and float16, not {spec.dtype}"
    if max(spec.head_dim, spec.value_dim) > 256:
        return f"head sizes to 256, not {max(spec.head_dim, spec.value_dim)}"
    return None


def _shape_class(spec: AttentionSpec) -> str:
    return f"hd{spec.head_dim}/{spec.value_dim} {'causal' if spec.causal else 'full'}"


ROWS = 8
"""Of a swizzled tile of shared memory: TMA knows an array's length in whole ones."""


def _padded(x: Array) -> Array:
    """[B, length, heads, size] with zeros behind."""
    widths = (0, -x.shape[1] % ROWS), (0, 0), (0, max(64, -(-x.shape[3] // 32) * 32) - x.shape[3])
    return jnp.pad(x, ((0, 0), *widths)) if any(after for _, after in widths) else x


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
    from llm_jax.kernels.flash_attention import gpu_forward

    q, k, v = (_padded(x) for x in (q, k, v))
    default = forward_tiles(spec, q.shape[-1], v.shape[-1])
    sizes = tiles("flash_attention", "gpu", dtype=spec.dtype, shape=_shape_class(spec), default=default)
    tiling = _tiling(spec, WARPGROUPS * sizes.q_block, sizes.kv_block)
    bounds = section_bounds(spec, tiling, masks, of="queries")
    out, lse = gpu_forward.forward(
        spec, sizes, q, k, v, _float32(alibi_slopes), _float32(sinks), _padded_masks(spec, tiling, masks), bounds
    )
    # `plgpu.kernel` does not say that its outputs differ over the mesh axes over which its inputs do.
    out, lse = manual_axes.vary((out, lse), manual_axes.axes_of(q, k, v))
    return out[:, : spec.q_len, :, : spec.value_dim], lse[..., : spec.q_len].mT


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
    """Gradients of q, k and v, and sums for those of slopes and sinks; probabilities are computed again from `lse`.

    `lse`: inf in a row that sees nothing. `delta`: what softmax subtracts, sum(out · d_out) less the gradient of `lse`.
    """
    from llm_jax.kernels.flash_attention import gpu_dkv, gpu_dq

    q, k, v, d_out = (_padded(x) for x in (q, k, v, d_out))
    default = backward_tiles(q.shape[-1], v.shape[-1])
    sizes = tiles("flash_attention", "gpu_backward", dtype=spec.dtype, shape=_shape_class(spec), default=default)
    slopes = _float32(alibi_slopes)
    lse = lse * math.log2(math.e)

    def run(kernel: Any, tiling: Tiling, of: str) -> Any:
        bounds = section_bounds(spec, tiling, masks, of=of)
        padding = ((0, 0), (0, tiling.q_padded - spec.q_len), (0, 0))
        rows = [jnp.pad(x, padding, constant_values=value) for x, value in ((lse, jnp.inf), (delta, 0.0))]
        statistics = jnp.stack(rows, 1).transpose(0, 3, 1, 2)
        return kernel(spec, sizes, q, k, v, slopes, _padded_masks(spec, tiling, masks), bounds, d_out, statistics)

    dq, sums = run(gpu_dq.dq, _tiling(spec, WARPGROUPS * sizes.dq_q_block, sizes.dq_kv_block), "queries")
    kv_tile = WARPGROUPS // sizes.dkv_panels * sizes.dkv_kv_block
    dk, dv = run(gpu_dkv.dkv, _tiling(spec, sizes.dkv_q_block, kv_tile), "keys")
    dq, sums, dk, dv = manual_axes.vary((dq, sums, dk, dv), manual_axes.axes_of(q, k, v))
    made = None if sums is None else RowSums(*(sums[:, i, :, : spec.q_len].mT for i in range(spec.row_sums)))
    T, S, H, Hv = spec.q_len, spec.kv_len, spec.head_dim, spec.value_dim
    return dq[:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :Hv], made


def _tiling(spec: AttentionSpec, q_block: int, kv_block: int) -> Tiling:
    return Tiling(spec.batch, 1, -(-spec.q_len // q_block), q_block, -(-spec.kv_len // kv_block), kv_block)


def _padded_masks(spec: AttentionSpec, tiling: Tiling, masks: MaskArrays) -> Any:
    """In whole blocks, and ranges as two arrays [B, T]."""
    masks = pad_masks(spec, tiling, masks)
    ranges = masks.kv_ranges
    return masks if ranges is None else masks._replace(kv_ranges=(ranges[..., 0], ranges[..., 1]))


def _float32(x: Array | None) -> Array | None:
    return None if x is None else x.astype(jnp.float32)
