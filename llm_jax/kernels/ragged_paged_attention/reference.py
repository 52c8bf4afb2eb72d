"""As the formula says, in float32, with each token's keys and values written out."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from llm_jax.kernels.ragged_paged_attention.pages import Pages
from llm_jax.kernels.ragged_paged_attention.spec import Batch, Extras, RaggedSpec


def supports(spec: RaggedSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def attention(
    spec: RaggedSpec, q: Float[Array, "T N H"], pages: Pages, batch: Batch, extras: Extras
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """Output in q's dtype and float32 log-sum-exp."""
    token = jnp.arange(spec.tokens)
    request = jnp.minimum(jnp.searchsorted(batch.cu_q_lens[1:], token, side="right"), spec.requests - 1)
    position = (token - batch.cu_q_lens[request + 1] + batch.kv_lens[request])[:, None]
    real = (token < batch.cu_q_lens[-1])[:, None, None]
    slot = jnp.arange(spec.table * spec.page_size)
    seen = slot <= position
    if spec.window is not None:
        seen &= slot > position - spec.window

    def of_tokens(x: Array, scales: Array | None) -> Float[Array, "T N S H"]:
        x = x.astype(jnp.float32)
        if scales is not None:
            x = x * scales[..., None]
        x = jnp.moveaxis(x[batch.page_tables[request]], 2, 1)
        x = x.reshape(spec.tokens, spec.kv_heads, -1, x.shape[-1])
        return jnp.where(seen[:, None, :, None], jnp.repeat(x, spec.group, axis=1), 0.0)

    k = of_tokens(pages.k, pages.k_scales)[..., : spec.head_dim]
    v = (k if pages.v is None else of_tokens(pages.v, pages.v_scales))[..., : spec.value_dim]
    q32 = jnp.where(real, q, 0).astype(jnp.float32)
    scores = jnp.einsum("tnh,tnsh->tns", q32, k, precision=lax.Precision.HIGHEST) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    if extras.alibi_slopes is not None:
        scores -= extras.alibi_slopes.astype(jnp.float32)[:, None] * (position - slot)[:, None]
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if extras.sinks is not None:
        sinks = jnp.broadcast_to(extras.sinks.astype(jnp.float32)[:, None], (spec.tokens, spec.heads, 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probs = (weights / jnp.where(total > 0, total, 1.0))[..., : slot.size]
    out = jnp.einsum("tns,tnsh->tnh", probs, v, precision=lax.Precision.HIGHEST)
    lse = (top + jnp.log(total))[..., 0]
    return jnp.where(real, out, 0.0).astype(q.dtype), jnp.where(real[..., 0], lse, -jnp.inf)
