"""The mixer of Mamba (Gu & Dao 2023, arXiv:2312.00752, figure 3), Falcon-Mamba and Jamba."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llm_jax import kernels
from llm_jax.models.cache import Cache
from llm_jax.models.config import ModelConfig
from llm_jax.models.feed_forward import residual_std, swiglu
from llm_jax.models.layers import Linear
from llm_jax.models.norms import RMSNorm, plain_norm
from llm_jax.models.shared import Shared
from llm_jax.models.state_cache import StateCache
from llm_jax.models.state_space import Rates, ShortConv, past
from llm_jax.sharding import constrain, on_shards

INNER = ("batch", "length", "inner")
KEPT = ("batch", "inner", None)


class Mamba(nnx.Module):
    """A selective scan of each channel over its document. Channels are cut over a tensor axis."""

    def __init__(self, config: ModelConfig):
        mamba, std = config.mamba, config.init_std
        mamba.check(heads=False)
        D, I, N, R = config.hidden_size, mamba.inner_size, mamba.state_size, mamba.dt_rank
        self.x = Linear(D, I, ("embed", "inner"), bias=mamba.bias, std=std)
        self.gate = Linear(D, I, ("embed", "inner"), bias=mamba.bias, std=std)
        self.conv = ShortConv(I, "inner", mamba)
        self.selection = Linear(I, R + 2 * N, ("inner", "ssm_state"), bias=False, std=std)
        if mamba.selection_norm == "weighted":
            self.dt_norm = RMSNorm(R, mamba.norm_eps)
            self.b_norm, self.c_norm = (RMSNorm(N, mamba.norm_eps) for _ in range(2))
        self.dt = Linear(R, I, ("ssm_state", "inner"), bias=False, std=(3 * R) ** -0.5)
        self.rates = Rates(I, "inner", N, mamba)
        self.o = Linear(I, D, ("inner", "embed"), bias=mamba.bias, std=residual_std(config))
        self.sizes, self.selection_norm, self.eps = (R, N), mamba.selection_norm, mamba.norm_eps
        self.chunk_size = mamba.chunk_size

    def __call__(
        self, x: Float[Array, "B T D"], shared: Shared, cache: Cache | StateCache
    ) -> tuple[Float[Array, "B T D"], Cache | StateCache]:
        """What the layer adds; the cache with the tokens in. `Packed`: every document begins from nothing."""
        segment_ids, held = shared.meta.segment_ids, past(cache)
        u, conv = self.conv(constrain(self.x(x), INNER), segment_ids, None if held is None else held.conv[0])
        dt, b, c = self._selected(u)
        steps, A, skip = self.rates(constrain(self.dt(dt), INNER))

        def scan(u: Array, steps: Array, A: Array, b: Array, c: Array, skip: Array, segment_ids, state):
            return kernels.selective_scan(
                u,
                steps,
                A,
                b,
                c,
                skip,
                segment_ids=segment_ids,
                initial_state=state,
                return_final_state=state is not None,
                chunk_size=self.chunk_size,
            )

        narrow = ("batch", "length", None)
        segments = None if segment_ids is None else ("batch", "length")
        kept = None if held is None else KEPT
        axes = (INNER, INNER, ("inner", None), narrow, narrow, ("inner",), segments, kept)
        state = None if held is None else held.state
        out = on_shards(scan, axes, INNER if held is None else (INNER, kept))(
            u, steps, A, b, c, skip, segment_ids, state
        )
        y, state = (out, None) if held is None else out
        out = self.o(constrain(swiglu(self.gate(x), y), INNER))
        return out, cache if state is None or conv is None else StateCache((conv,), state)

    def _selected(self, u: Float[Array, "B T I"]) -> tuple[Array, Array, Array]:
        """What the step sizes are made of [B, T, R], B and C [B, T, N]."""
        rank, states = self.sizes
        dt, b, c = jnp.split(self.selection(u), (rank, rank + states), axis=-1)
        if self.selection_norm == "weighted":
            return self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        if self.selection_norm == "plain":
            return plain_norm(dt, self.eps), plain_norm(b, self.eps), plain_norm(c, self.eps)
        return dt, b, c
