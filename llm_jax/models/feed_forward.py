"""The dense feed-forward layer, gated or not."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llm_jax.kernels.swiglu import gradients
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import Linear
from llm_jax.sharding import constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
"""By the names of `ModelConfig.activation`; relu2 is Primer's (So et al. 2021, arXiv:2109.08668)."""


@jax.custom_vjp
def swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """`silu(gate) * up`. Its backward pass keeps these two; as JAX derives it, five arrays of the greatest width."""
    return jax.nn.silu(gate) * up


def _gate_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu(gate, up), (gate, up)


def _gate_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    return gradients(*saved, g)


swiglu.defvjp(_gate_forward, _gate_backward)


class FeedForward(nnx.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, eq. 6), or `down(act(up(x)))` without a gate."""

    def __init__(self, config: ModelConfig):
        D, F, std = config.hidden_size, config.intermediate_size, config.init_std
        if config.gated:
            self.gate = Linear(D, F, ("embed", "mlp"), bias=config.mlp_bias, std=std)
        self.up = Linear(D, F, ("embed", "mlp"), bias=config.mlp_bias, std=std)
        self.down = Linear(F, D, ("mlp", "embed"), bias=config.mlp_bias, std=residual_std(config))
        self.activation, self.gated = config.activation, config.gated

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            inner = act(self.up(x))
        elif self.activation == "silu":
            inner = swiglu(self.gate(x), self.up(x))
        else:
            inner = act(self.gate(x)) * self.up(x)
        return self.down(constrain(inner, ("batch", "length", "mlp")))


def residual_std(config: ModelConfig) -> float:
    """Initial standard deviation of projections whose result is added to the residual stream."""
    return config.init_std * (2 * config.num_layers) ** -0.5 if config.depth_scaled_init else config.init_std
