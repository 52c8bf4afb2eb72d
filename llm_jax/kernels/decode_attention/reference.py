"""As the formula says, in float32, with the keys of each query head written out."""

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
    """Output in q's dtype."""
    k, v = (jnp.repeat(x.astype(jnp.float32), spec.group, axis=1) for x in (k, v))
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bnh,bnsh->bns", q.astype(jnp.float32), k, precision=highest) * spec.scale
    grouped = scores.reshape(spec.batch, spec.kv_heads, spec.group, -1)
    scores = transformed(spec, grouped, lengths, extras).reshape(scores.shape)
    if extras.sinks is not None:
        sink = jnp.broadcast_to(extras.sinks.astype(jnp.float32)[:, None], (spec.batch, spec.heads, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1)[..., : spec.slots]
    return jnp.einsum("bns,bnsh->bnh", probs, v, precision=highest).astype(q.dtype)
