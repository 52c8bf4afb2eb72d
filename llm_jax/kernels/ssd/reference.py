"""Token by token in float32, as the recurrence says. For tests and for reading."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.ssd.spec import SsdSpec


def supports(spec: SsdSpec, platform: str) -> str | None:
    """Runs everything, everywhere; its backward pass keeps the states of all tokens."""
    return None


def scan(
    spec: SsdSpec,
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    skip: Float[Array, " H"],
    starts: Bool[Array, "B T"],
    initial_state: Float[Array, "B H P N"],
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """Output in x's dtype, final state in float32; differentiated by JAX."""

    def token(state: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        x, dt, b, c, start = xs
        b, c = (jnp.repeat(y, spec.per_group, axis=1)[:, :, None] for y in (b, c))
        state = jnp.where(start[:, None, None, None], 0.0, state)
        state = jnp.exp(dt * A)[..., None, None] * state + (dt[..., None] * x)[..., None] * b
        return state, jnp.sum(state * c, axis=-1) + skip[:, None] * x

    x32, dt, A, B, C, skip = (y.astype(jnp.float32) for y in (x, dt, A, B, C, skip))
    final, y = jax.lax.scan(token, initial_state, tuple(jnp.swapaxes(a, 0, 1) for a in (x32, dt, B, C, starts)))
    return jnp.swapaxes(y, 0, 1).astype(x.dtype), final
