"""Multi-head latent attention: keys and values of all heads come from one small vector, which is all a cache keeps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llm_jax.models.cache import Empty, LatentCache, Packed, Scoring
from llm_jax.models.config import ModelConfig
from llm_jax.models.feed_forward import residual_std
from llm_jax.models.layers import Linear
from llm_jax.models.norms import RMSNorm
from llm_jax.models.rope import rotate, yarn_mscale
from llm_jax.models.shared import Shared
from llm_jax.models.weights import in_compute
from llm_jax.sharding import constrain


class LatentAttention(nnx.Module):
    """DeepSeek-V2 (arXiv:2405.04434), eqs. 9 to 19.

    Without a past, keys and values are written out. Over a cache they never are: the part of a score that does not
    turn is q · (U c) = (Uᵀ q) · c, so queries go to the compressed vectors, and values are made of what comes back
    (section 2.1.2, "absorbed").
    """

    def __init__(self, config: ModelConfig):
        size, D, N, std = config.latent, config.hidden_size, config.num_heads, config.init_std
        bias = config.attention_bias
        if size.q_rank is None:
            self.q = Linear(D, N * size.head_dim, ("embed", "heads"), bias=False, std=std)
        else:
            self.q_down = Linear(D, size.q_rank, ("embed", "latent"), bias=bias, std=std)
            self.q_norm = RMSNorm(size.q_rank, size.norm_eps)
            self.q_up = Linear(size.q_rank, N * size.head_dim, ("latent", "heads"), bias=False, std=std)
        self.kv_down = Linear(D, size.kv_rank + size.rope_dim, ("embed", "latent"), bias=bias, std=std)
        self.kv_norm = RMSNorm(size.kv_rank, size.norm_eps)
        self.kv_up = Linear(
            size.kv_rank, N * (size.nope_dim + size.value_dim), ("latent", "heads"), bias=False, std=std
        )
        self.o = Linear(N * size.value_dim, D, ("heads", "embed"), bias=bias, std=residual_std(config))
        self.size, self.heads, self.compressed = size, N, size.q_rank is not None
        self.scale, self.interleaved = latent_scale(config), config.rope_interleaved

    def __call__(self, x: Float[Array, "B T D"], shared: Shared, cache: Any) -> tuple[Float[Array, "B T D"], Any]:
        size = self.size
        q = self.q_up(self.q_norm(self.q_down(x))) if self.compressed else self.q(x)
        q = constrain(q.reshape(*x.shape[:2], self.heads, size.head_dim), ("batch", "length", "heads", None))
        down = self.kv_down(x)
        kept, turning = self.kv_norm(down[..., : size.kv_rank]), down[..., size.kv_rank :]
        q_nope, q_rope = q[..., : size.nope_dim], q[..., size.nope_dim :]
        assert shared.rope is not None
        q_rope = rotate(q_rope, shared.rope, self.interleaved)
        k_rope = rotate(turning[:, :, None], shared.rope, self.interleaved)
        scoring = Scoring(scale=self.scale)
        after: Any
        if isinstance(cache, LatentCache):
            out, after = self._absorbed(q_nope, q_rope, kept, k_rope, shared, cache, scoring)
        else:
            out, after = self._written_out(q_nope, q_rope, kept, k_rope, shared, cache, scoring)
        return self.o(out.reshape(*x.shape[:2], -1)), after

    def _written_out(
        self,
        q_nope: Array,
        q_rope: Array,
        kept: Array,
        k_rope: Array,
        shared: Shared,
        cache: Packed | Empty,
        scoring: Scoring,
    ) -> tuple[Float[Array, "B T N V"], Packed | LatentCache]:
        size = self.size
        up = self.kv_up(kept).reshape(*kept.shape[:2], self.heads, size.nope_dim + size.value_dim)
        up = constrain(up, ("batch", "length", "heads", None))
        k = jnp.concatenate([up[..., : size.nope_dim], jnp.broadcast_to(k_rope, q_rope.shape)], axis=-1)
        q, v = jnp.concatenate([q_nope, q_rope], axis=-1), up[..., size.nope_dim :]
        packed = cache if isinstance(cache, Packed) else Packed(ends=cache.ends)
        out, _ = packed.attend(q, k, v, shared.meta, scoring)
        if isinstance(cache, Packed):
            return out, cache
        assert isinstance(cache.cache, LatentCache)
        return out, cache.cache.write(self._kept(kept, k_rope), shared.meta)

    def _absorbed(
        self,
        q_nope: Array,
        q_rope: Array,
        kept: Array,
        k_rope: Array,
        shared: Shared,
        cache: LatentCache,
        scoring: Scoring,
    ) -> tuple[Float[Array, "B T N V"], LatentCache]:
        size = self.size
        weight = in_compute(self.kv_up).whole()
        weight = weight.reshape(size.kv_rank, self.heads, size.nope_dim + size.value_dim)
        highest = jax.lax.Precision.HIGHEST if q_nope.dtype == jnp.float32 else None
        q = jnp.einsum("btnh,rnh->btnr", q_nope, weight[..., : size.nope_dim], precision=highest)
        q = jnp.concatenate([q, q_rope], axis=-1)
        sums, after = cache.attend(q, self._kept(kept, k_rope), shared.meta, scoring)
        return jnp.einsum("btnr,rnv->btnv", sums, weight[..., size.nope_dim :], precision=highest), after

    @staticmethod
    def _kept(kept: Array, k_rope: Array) -> Float[Array, "B T 1 R"]:
        return jnp.concatenate([kept[:, :, None], k_rope], axis=-1)


def latent_scale(config: ModelConfig) -> float:
    """Of scores: head_dim ** -0.5, with DeepSeek's square of YaRN's factor, which other models put into rotations."""
    scale = config.latent.head_dim**-0.5 if config.query_scale is None else config.query_scale
    scaling = config.rope_scaling
    if scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale
