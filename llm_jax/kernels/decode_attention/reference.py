"""As the formula says, in float32, with the keys of each query head written out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels.decode_attention.spec import DecodeSpec


def supports(spec: DecodeSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def attention(
    spec: DecodeSpec,
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S Hv"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B N Hv"]:
    """Output in q's dtype."""
    k, v = (jnp.repeat(x.astype(jnp.float32), spec.group, axis=1) for x in (k, v))
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("bnh,bnsh->bns", q.astype(jnp.float32), k, precision=highest) * spec.scale
    seen = jnp.arange(spec.slots) < lengths[:, None, None]
    probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bns,bnsh->bnh", probs, v, precision=highest).astype(q.dtype)
