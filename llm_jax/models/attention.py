"""Softmax attention with its own keys and values: MHA, GQA, MQA."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from llm_jax.models.cache import Cache, Scoring
from llm_jax.models.config import ModelConfig
from llm_jax.models.feed_forward import residual_std
from llm_jax.models.layers import Linear
from llm_jax.models.norms import RMSNorm, plain_norm
from llm_jax.models.parameter import vector
from llm_jax.models.rope import rotate
from llm_jax.models.segments import LayerSpec
from llm_jax.models.shared import Shared
from llm_jax.models.weights import gathered
from llm_jax.sharding import constrain


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), with or without a gate on what it gives (Qiu et
    al. 2025, arXiv:2505.06708, section 2.2, "G1").

    Of its cache it knows `attend(q, k, v, meta, scoring)` only.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec):
        D, H, std = config.hidden_size, config.head_dim, config.init_std
        assert H is not None and config.num_kv_heads is not None and config.output_bias is not None
        N, K, bias = config.num_heads * H, config.num_kv_heads * H, config.attention_bias
        self.q = Linear(D, N, ("embed", "heads"), bias=bias, std=std)
        self.k = Linear(D, K, ("embed", "kv_heads"), bias=bias, std=std)
        self.v = Linear(D, K, ("embed", "kv_heads"), bias=bias, std=std)
        gates = {"none": 0, "head": config.num_heads, "element": N}[config.attention_gate]
        self.gate = Linear(D, gates, ("embed", "heads"), bias=bias, std=std) if gates else None
        self.o = Linear(N, D, ("heads", "embed"), bias=config.output_bias, std=residual_std(config))
        if config.qk_norm in ("head", "whole"):
            whole, offset = config.qk_norm == "whole", config.norm == "rms_offset"
            sizes = ((N, "heads"), (K, "kv_heads")) if whole else ((H, "head_dim"),) * 2
            self.q_norm, self.k_norm = (
                RMSNorm(size, config.norm_eps, offset=offset, axis=axis) for size, axis in sizes
            )
        self.plain_eps = config.norm_eps if config.qk_norm == "plain" and spec.rope != "none" else None
        self.growth = (config.query_growth, config.query_growth_every) if spec.rope == "none" else (None, 0)
        self.sinks = Sinks(config.num_heads) if config.sinks else None
        self.head_dim, self.qk_norm, self.interleaved = H, config.qk_norm, config.rope_interleaved
        self.scale = (H**-0.5 if config.query_scale is None else config.query_scale) / spec.divisor
        self.softcap, self.clip, self.rope = config.attention_softcap, config.qkv_clip, spec.rope
        alibi = config.positions == "alibi"
        self.slopes = tuple(alibi_slopes(config.num_heads) * config.alibi_scale) if alibi else None

    def __call__(self, x: Float[Array, "B T D"], shared: Shared, cache: Cache) -> tuple[Float[Array, "B T D"], Cache]:
        def heads(y: Array, name: str) -> Array:
            return constrain(y.reshape(*y.shape[:2], -1, self.head_dim), ("batch", "length", name, None))

        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
        q, k, v = heads(q, "heads"), heads(k, "kv_heads"), heads(v, "kv_heads")
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        turned = shared.local_rope if self.rope == "local" else shared.rope
        if self.rope != "none" and turned is not None:
            q, k = rotate(q, turned, self.interleaved), rotate(k, turned, self.interleaved)
        if self.plain_eps is not None:
            q, k = plain_norm(q, self.plain_eps), plain_norm(k, self.plain_eps)
        growth, every = self.growth
        if growth is not None:
            steps = jnp.floor((shared.meta.positions + 1) / every)
            q = (q * (1 + growth * jnp.log1p(steps))[..., None, None]).astype(q.dtype)
        scoring = Scoring(
            self.scale,
            self.softcap,
            None if self.slopes is None else jnp.array(self.slopes, jnp.float32),
            None if self.sinks is None else self.sinks(),
        )
        out, cache = cache.attend(q, k, v, shared.meta, scoring)
        if self.gate is not None:
            gate = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
            out = (out * gate.reshape(*out.shape[:3], -1)).astype(x.dtype)
        return self.o(out.reshape(*x.shape[:2], -1)), cache


class Sinks(nnx.Module):
    """A logit per head that draws attention away from all tokens (Xiao et al. 2023, arXiv:2309.17453; gpt-oss)."""

    def __init__(self, heads: int):
        self.weight = vector(heads, "heads", "zeros")

    @gathered
    def __call__(self) -> Float[Array, " N"]:
        return self.weight.get_value()


def alibi_slopes(heads: int) -> np.ndarray:
    """Press et al. 2021 (arXiv:2108.12409): a geometric series from 2^(-8/n), n the power of two below `heads`; what
    is missing comes from every other one of the series of twice that many. float64[N]."""
    whole = 2 ** int(math.log2(heads))

    def series(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    return np.concatenate([series(whole), series(2 * whole)[::2][: heads - whole]])
