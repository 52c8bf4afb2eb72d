"""Two batched products over slots as they lie in memory: keys and values are read once and never moved."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels.decode_attention.spec import DecodeSpec, Extras, transformed


def supports(spec: DecodeSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def attention(
    spec: DecodeSpec,
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S Hv"],
    lengths: Int[Array, "B"],
    extras: Extras,
) -> Float[Array, "B N Hv"]:
    """Output in q's dtype. Probabilities are rounded to the dtype of the values, as in `flash_attention`."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def dot(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)

    q = q.reshape(spec.batch, spec.kv_heads, spec.group, -1)
    scores = transformed(spec, dot("bkgh,bksh->bkgs", q, k) * spec.scale, lengths, extras)
    top = jnp.max(scores, axis=-1, keepdims=True)
    sinks = None
    if extras.sinks is not None:
        sinks = extras.sinks.astype(jnp.float32).reshape(spec.kv_heads, spec.group, 1)
        top = jnp.maximum(top, sinks)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    out = dot("bkgs,bksh->bkgh", weights.astype(v.dtype), v) / total
    return out.reshape(spec.batch, spec.heads, -1).astype(q.dtype)
