"""Token by token: a window of the last K inputs, emptied where a document begins."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.causal_conv1d.spec import ConvSpec


def supports(spec: ConvSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def convolve(
    spec: ConvSpec,
    x: Float[Array, "B T D"],
    weight: Float[Array, "K D"],
    bias: Float[Array, " D"] | None,
    real: Bool[Array, "B T"],
    starts: Bool[Array, "B T"],
    initial_state: Float[Array, "B K-1 D"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B K-1 D"]]:
    """Output in x's dtype, final state in float32; differentiated by JAX."""
    weight = weight.astype(jnp.float32)

    def token(window: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, real, start = xs
        past = jnp.where(start[:, None, None], 0.0, window)
        inputs = jnp.concatenate([past, x[:, None]], axis=1)
        z = jnp.sum(inputs * weight, axis=1)
        if bias is not None:
            z += bias.astype(jnp.float32)
        y = jax.nn.silu(z) if spec.silu else z
        return jnp.where(real[:, None, None], inputs[:, 1:], window), jnp.where(real[:, None], y, 0.0)

    xs = (jnp.swapaxes(x.astype(jnp.float32), 0, 1), real.T, starts.T)
    final, y = jax.lax.scan(token, initial_state.astype(jnp.float32), xs)
    return jnp.swapaxes(y, 0, 1).astype(x.dtype), final
