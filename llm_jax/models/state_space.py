"""What Mamba and Mamba-2 layers have in common: the short convolution, and how a state fades."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llm_jax import kernels
from llm_jax.base.errors import UserError
from llm_jax.models.cache import Cache, Packed
from llm_jax.models.feed_forward import ACTIVATIONS
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import Declaration, Init, parameter, vector
from llm_jax.models.state_cache import StateCache
from llm_jax.models.weights import gathered
from llm_jax.sharding import on_shards


def past(cache: Cache | StateCache) -> StateCache | None:
    """The state that a layer goes on from; None where there is none (`Packed`). Raises UserError for other caches."""
    if isinstance(cache, StateCache):
        return cache
    if isinstance(cache, Packed):
        return None
    raise UserError(f"a state-space layer has no use for a {type(cache).__name__}")


class ShortConv(nnx.Module):
    """Depthwise causal convolution with its activation, over the tokens of each document."""

    def __init__(self, channels: int, axis: str, config: MambaConfig):
        width = config.conv_width
        # The spread of torch's default for Conv1d, uniform within K^-0.5.
        declared = Declaration(("conv_width", axis), None, True, Init("normal", (3 * width) ** -0.5))
        self.weight = parameter((width, channels), declared)
        self.bias = vector(channels, axis, "zeros") if config.conv_bias else None
        self.axis, self.activation = axis, config.activation

    @gathered
    def _weights(self) -> tuple[Array, Array | None]:
        return self.weight.get_value(), None if self.bias is None else self.bias.get_value()

    def __call__(
        self, x: Float[Array, "B T C"], segment_ids: Int[Array, "B T"] | None, state: Float[Array, "B K-1 C"] | None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"] | None]:
        """The result, and the inputs to keep where some were given."""
        silu = self.activation == "silu"

        def conv(x: Array, weight: Array, bias: Array | None, segment_ids: Array | None, state: Array | None):
            return kernels.causal_conv1d(
                x,
                weight,
                bias,
                activation="silu" if silu else None,
                segment_ids=segment_ids,
                initial_state=state,
                return_final_state=state is not None,
            )

        weight, bias = self._weights()
        along = ("batch", "length", self.axis)
        segments = None if segment_ids is None else ("batch", "length")
        kept = None if state is None else ("batch", None, self.axis)
        axes = along, (None, self.axis), None if bias is None else (self.axis,), segments, kept
        out = on_shards(conv, axes, along if state is None else (along, kept))(x, weight, bias, segment_ids, state)
        y, state = (out, None) if state is None else out
        return (y if silu else ACTIVATIONS[self.activation](y)), state


class Rates(nnx.Module):
    """How fast states fade: `A = -exp(A_log)`, the bias of the step sizes, and the weight of the input itself (D).

    Used in float32 whatever the compute dtype, as the authors' code keeps them (state-spaces/mamba).
    """

    def __init__(self, size: int, axis: str, states: int | None, config: MambaConfig):
        """A of shape [size], or [size, states]. It starts at -1, -2, … along its last axis (S4D-Real)."""
        axis = f"{axis}_rates"
        shape, axes = ((size,), (axis,)) if states is None else ((size, states), (axis, "ssm_state"))
        steps = config.dt_init_min, config.dt_init_max, config.dt_init_floor
        self.A_log = parameter(shape, Declaration(axes, None, False, Init("log_arange")))
        self.dt_bias = parameter((size,), Declaration((axis,), None, False, Init("step_bias", steps=steps)))
        self.skip = vector(size, axis, "ones")
        self.limits = config.dt_min, config.dt_max

    @gathered
    def _weights(self) -> tuple[Array, Array, Array]:
        rates, bias, skip = (p.get_value().astype(jnp.float32) for p in (self.A_log, self.dt_bias, self.skip))
        return -jnp.exp(rates), bias, skip

    def __call__(self, dt: Float[Array, "B T C"]) -> tuple[Array, Array, Array]:
        """float32: the step sizes made of `dt`, A, and the weight of the input."""
        A, bias, skip = self._weights()
        steps = jax.nn.softplus(dt.astype(jnp.float32) + bias)
        low, high = self.limits
        if low > 0 or high is not None:
            steps = jnp.clip(steps, low, high)
        return steps, A, skip
