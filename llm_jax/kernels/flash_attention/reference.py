"""Attention as the formula says: all scores at once, softmax in float32. For tests and for reading."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, Rows, alibi_bias, first_position, visible


def supports(spec: AttentionSpec, platform: str) -> str | None:
    """Runs everything, everywhere, in memory B·N·T·S."""
    return None


def attention(
    spec: AttentionSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    alibi_slopes: Float[Array, " N"] | None,
    sinks: Float[Array, " N"] | None,
    masks: MaskArrays,
    dropout_keys: UInt32[Array, "B N 2"] | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output in q's dtype and float32 log-sum-exp; differentiated by JAX."""
    B, T, S, K, G = spec.batch, spec.q_len, spec.kv_len, spec.kv_heads, spec.group
    q_KG = q.reshape(B, T, K, G, spec.head_dim).astype(jnp.float32)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgh,bskh->bkgts", q_KG, k, precision=highest) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    rows, keys = _sides(spec, masks)
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(jnp.float32).reshape(K, G, 1, 1)
        scores += alibi_bias(slopes, *(jax.tree.map(_at_heads, side) for side in (rows, keys)))
    seen = visible(spec, rows, keys)
    seen = jnp.ones((1, 1, 1, 1, 1), bool) if seen is None else _at_heads(seen)
    logits = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(K, G, 1, 1), (B, K, G, T, 1))
        logits = jnp.concatenate([logits, sink], -1)
    empty = jnp.all(logits == -jnp.inf, axis=-1)
    # A row that sees nothing must stay out of the softmax altogether, or its gradient is NaN.
    safe = jnp.where(empty[..., None], 0.0, logits)
    lse = jnp.where(empty, -jnp.inf, jax.nn.logsumexp(safe, axis=-1))
    probs = jnp.where(empty[..., None], 0.0, jax.nn.softmax(safe, axis=-1))[..., :S]
    if dropout_keys is not None:
        kept = _kept(dropout_keys.reshape(B, K, G, 2), 1 - spec.dropout, (T, S))
        probs = jnp.where(kept, probs / (1 - spec.dropout), 0.0)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v, precision=highest)
    return out.reshape(B, T, K * G, spec.value_dim).astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(B, T, K * G)


def _kept(keys: Array, share: float, shape: tuple[int, int]) -> Array:
    """bool[B, K, G, T, S]: each head of each row draws from its own key, so that cutting either changes nothing."""
    draw = lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key), share, shape)  # noqa: E731
    return jax.vmap(jax.vmap(jax.vmap(draw)))(keys)


def _sides(spec: AttentionSpec, masks: MaskArrays) -> tuple[Rows, Rows]:
    """Both sides of the whole mask, as [B or 1, T, 1] and [B or 1, 1, S]."""
    q_index, kv_index = jnp.arange(spec.q_len), jnp.arange(spec.kv_len)
    q_positions = q_index[None] + first_position(spec) if masks.q_positions is None else masks.q_positions
    kv_positions = kv_index[None] if masks.kv_positions is None else masks.kv_positions
    ranges = masks.kv_ranges
    rows = Rows(
        q_index[None, :, None],
        q_positions[:, :, None],
        None if masks.q_segments is None else masks.q_segments[:, :, None],
        None if ranges is None else ranges[:, :, :1],
        None if ranges is None else ranges[:, :, 1:],
    )
    keys = Rows(
        kv_index[None, None],
        kv_positions[:, None],
        None if masks.kv_segments is None else masks.kv_segments[:, None],
    )
    return rows, keys


def _at_heads(x: Array) -> Array:
    return x[:, None, None]
