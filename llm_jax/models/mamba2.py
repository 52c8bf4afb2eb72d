"""The mixer of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, figure 6), Bamba, Granite 4 and Nemotron-H."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llm_jax import kernels
from llm_jax.base.errors import UserError
from llm_jax.models.cache import Cache
from llm_jax.models.config import ModelConfig
from llm_jax.models.feed_forward import residual_std
from llm_jax.models.layers import Linear
from llm_jax.models.parameter import vector
from llm_jax.models.shared import Shared
from llm_jax.models.state_cache import StateCache
from llm_jax.models.state_space import Rates, ShortConv, past
from llm_jax.models.weights import gathered
from llm_jax.sharding import axis_index, constrain, on_shards

INNER = ("batch", "length", "inner")
HEADS = ("batch", "length", "ssm_heads")
KEPT = ("batch", "ssm_heads", None, None)


class GatedNorm(nnx.Module):
    """RMSNorm of `y silu(gate)`, each group of channels for itself. Statistics in float32."""

    def __init__(self, size: int, groups: int, eps: float):
        self.weight = vector(size, "inner", "ones")
        self.groups, self.eps = groups, eps

    @gathered
    def __call__(self, y: Float[Array, "... I"], gate: Float[Array, "... I"]) -> Float[Array, "... I"]:
        gated = y.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        grouped = gated.reshape(*y.shape[:-1], self.groups, -1)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + self.eps)
        return ((grouped * scale).reshape(y.shape) * self.weight.get_value().astype(jnp.float32)).astype(y.dtype)


class Mamba2(nnx.Module):
    """A state-space dual of each head over its document. Heads are cut over a tensor axis; B and C are whole on each
    shard, which takes the groups of its heads."""

    def __init__(self, config: ModelConfig):
        mamba, std = config.mamba, config.init_std
        mamba.check(heads=True)
        D, I, H = config.hidden_size, mamba.inner_size, mamba.num_heads
        shared = 2 * mamba.num_groups * mamba.state_size
        self.gate = Linear(D, I, ("embed", "inner"), bias=mamba.bias, std=std)
        self.x = Linear(D, I, ("embed", "inner"), bias=mamba.bias, std=std)
        self.bc = Linear(D, shared, ("embed", "ssm_state"), bias=mamba.bias, std=std)
        self.dt = Linear(D, H, ("embed", "ssm_heads"), bias=mamba.bias, std=std)
        self.x_conv = ShortConv(I, "inner", mamba)
        self.bc_conv = ShortConv(shared, "ssm_state", mamba)
        self.rates = Rates(H, "ssm_heads", None, mamba)
        self.norm = GatedNorm(I, mamba.num_groups, mamba.norm_eps)
        self.o = Linear(I, D, ("inner", "embed"), bias=mamba.bias, std=residual_std(config))
        self.heads, self.groups, self.states = H, mamba.num_groups, mamba.state_size
        self.chunk_size = mamba.chunk_size

    def __call__(
        self, x: Float[Array, "B T D"], shared: Shared, cache: Cache | StateCache
    ) -> tuple[Float[Array, "B T D"], Cache | StateCache]:
        """What the layer adds; the cache with the tokens in. `Packed`: every document begins from nothing."""
        segment_ids, held = shared.meta.segment_ids, past(cache)
        u, u_kept = self.x_conv(constrain(self.x(x), INNER), segment_ids, None if held is None else held.conv[0])
        bc, bc_kept = self.bc_conv(self.bc(x), segment_ids, None if held is None else held.conv[1])
        b, c = jnp.moveaxis(bc.reshape(*bc.shape[:2], 2, self.groups, self.states), 2, 0)
        steps, A, skip = self.rates(constrain(self.dt(x), HEADS))
        per_head = constrain(u.reshape(*u.shape[:2], self.heads, -1), (*HEADS, None))

        def scan(x: Array, steps: Array, A: Array, b: Array, c: Array, skip: Array, segment_ids, state):
            return kernels.ssd(
                x,
                steps,
                A,
                self._own_groups(b, x.shape[2]),
                self._own_groups(c, x.shape[2]),
                skip,
                segment_ids=segment_ids,
                initial_state=state,
                return_final_state=state is not None,
                chunk_size=self.chunk_size,
            )

        whole = ("batch", "length", None, None)
        segments = None if segment_ids is None else ("batch", "length")
        kept = None if held is None else KEPT
        axes = ((*HEADS, None), HEADS, ("ssm_heads",), whole, whole, ("ssm_heads",), segments, kept)
        state = None if held is None else held.state
        out = on_shards(scan, axes, (*HEADS, None) if held is None else ((*HEADS, None), kept))(
            per_head, steps, A, b, c, skip, segment_ids, state
        )
        y, state = (out, None) if held is None else out
        y = self.norm(constrain(y.reshape(u.shape), INNER), self.gate(x))
        out = self.o(constrain(y, INNER))
        if state is None or u_kept is None or bc_kept is None:
            return out, cache
        return out, StateCache((u_kept, bc_kept), state)

    def _own_groups(self, x: Float[Array, "B T G N"], heads: int) -> Float[Array, "B T g N"]:
        """Of a shard of `heads` heads: the groups that they read."""
        per_group = self.heads // self.groups
        if heads == self.heads:
            return x
        if heads % per_group and per_group % heads:
            raise UserError(f"mesh.tensor: {heads} heads of a shard do not go with groups of {per_group} heads")
        first = axis_index("ssm_heads") * heads // per_group
        return jax.lax.dynamic_slice_in_dim(x, first, max(1, heads // per_group), axis=2)
