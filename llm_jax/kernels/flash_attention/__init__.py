"""Softmax attention over a mask that is never built: causal, window, chunk, packed documents, ranges of keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from llm_jax.kernels import manual_axes
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.flash_attention import gpu, reference, tpu, unseen, xla
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, attention_spec, mask_arrays

IMPLEMENTATIONS = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}
OP = Op("flash_attention", attention_spec, IMPLEMENTATIONS, order=("tpu", "gpu", "xla"))


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    kv_ranges: Int[Array, "B T 2"] | Int[Array, "B 2"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keys: UInt32[Array, "B N 2"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """softmax(softcap(scale · q kᵀ) + alibi, over the visible keys and the sink) · v, with softmax in float32.

    Key j is visible to query i (i and j positions) iff all that is asked for holds: `causal`: j <= i; `window`:
    i - window < j, and j < i + window where not causal; `chunk`: i // chunk == j // chunk; `segment_ids`: equal and
    not 0 (0 is padding); `kv_ranges`: the key's index, not its position, is in [start, end).

    Args:
        q, k, v: one dtype of float32, bfloat16, float16. K divides N; query head n reads key head n // (N / K).
        softcap: scores become softcap · tanh(scores / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118).
        scale: of the scores; default H^-0.5.
        alibi_slopes: adds -slope · |i - j| (https://arxiv.org/abs/2108.12409).
        sinks: a further logit per head that takes part in the softmax and has no value (gpt-oss).
        segment_ids: packed documents; one array where queries and keys are the same tokens, else a pair. Packed
            documents need no positions for a causal or window mask: indices give the same one, and it is then known
            at compile time which blocks of keys come later. `chunk` does need restarted positions.
        q_positions: default: aligned with the last keys, arange(T) + S - T. kv_positions: default arange(S).
        kv_ranges: per query or per row of the batch.
        dropout_rate: share of the softmax's weights set to 0, the others divided by 1 - dropout_rate; the log-sum-exp
            is without. `dropout_keys`: data of a Threefry key per row and query head. Only "reference" has it.
        return_lse: also return float32[B, T, N], the log-sum-exp of the row with its sink, in nats.
        implementation: "tpu", "gpu" (Hopper), "xla" or "reference"; None takes the best one for the machine. See
            `kernels.explain`.

    Returns:
        [B, T, N, Hv] in q's dtype, or that and the log-sum-exp. A query that sees no key gives 0, log-sum-exp -inf
        (its sink's logit where there is one), and gradient 0. Gradients flow to q, k, v, alibi_slopes and sinks, also
        through the log-sum-exp; reverse mode only. Results are named "attention_out" and "attention_lse" for
        `jax.checkpoint` policies: one that saves both names does not run the forward pass again.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit, or an implementation that can't run them.

    Source: FlashAttention-2, https://arxiv.org/abs/2307.08691.
    """
    options: dict[str, Any] = dict(
        causal=causal, window=window, chunk=chunk, softcap=softcap, scale=scale, alibi_slopes=alibi_slopes, sinks=sinks
    )
    dropping: dict[str, Any] = dict(dropout_rate=dropout_rate, dropout_keys=dropout_keys)
    mask_options: dict[str, Any] = dict(
        segment_ids=segment_ids, q_positions=q_positions, kv_positions=kv_positions, kv_ranges=kv_ranges
    )
    spec = attention_spec(q, k, v, **options, **dropping, **mask_options)
    name = choose(OP, spec, implementation)
    arrays = (q, k, v, alibi_slopes, sinks, mask_arrays(spec, **mask_options))
    arrays = manual_axes.vary(arrays, manual_axes.axes_of(arrays))
    if name == "reference":
        out, lse = reference.attention(spec, *arrays, dropout_keys=dropout_keys)
    else:
        out, lse = _attention(name, spec, *arrays)
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    name: str, spec: AttentionSpec, q: Array, k: Array, v: Array, slopes: Any, sinks: Any, masks: MaskArrays
) -> tuple[Array, Array]:
    k, v = unseen.for_forward(spec, k, v)
    return OP.implementations[name].forward(spec, q, k, v, slopes, sinks, masks)


def _forward(name: str, spec: AttentionSpec, q: Array, k: Array, v: Array, slopes: Any, sinks: Any, masks: MaskArrays):
    out, lse = _attention(name, spec, q, k, v, slopes, sinks, masks)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, slopes, sinks, masks, out, lse)


def _backward(name: str, spec: AttentionSpec, saved: tuple, cotangents: tuple[Array, Array]):
    q, k, v, slopes, sinks, masks, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    q, k, v = unseen.for_backward(spec, q, k, v)
    # exp(score - inf) is the 0 that a row which sees nothing needs.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    of = OP.implementations[name]
    dq, dk, dv, sums = of.backward(spec, q, k, v, slopes, masks, lse, d_out, delta)
    d_slopes, d_sinks = None, None
    if sums is not None:
        delta = sums.gradient - d_lse
        if slopes is not None:
            d_slopes = jnp.sum(sums.biased_gradient - delta * sums.bias, axis=(0, 1)).astype(slopes.dtype)
        if sinks is not None:
            d_sinks = -jnp.sum(jnp.exp(sinks.astype(jnp.float32) - lse) * delta, axis=(0, 1)).astype(sinks.dtype)
    return dq, dk, dv, d_slopes, d_sinks, None


_attention.defvjp(_forward, _backward)
