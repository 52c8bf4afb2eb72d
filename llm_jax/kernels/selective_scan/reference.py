"""Token by token in float32, as the recurrence says. For tests and for reading."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.selective_scan.spec import ScanSpec


def supports(spec: ScanSpec, platform: str) -> str | None:
    """Runs everything, everywhere; its backward pass keeps the states of all tokens."""
    return None


def scan(
    spec: ScanSpec,
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    skip: Float[Array, " D"],
    starts: Bool[Array, "B T"],
    initial_state: Float[Array, "B D N"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Output in u's dtype, final state in float32; differentiated by JAX."""

    def token(state: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        u, delta, b, c, start = xs
        state = jnp.where(start[:, None, None], 0.0, state)
        state = jnp.exp(delta[:, :, None] * A) * state + (delta * u)[:, :, None] * b[:, None]
        return state, jnp.sum(state * c[:, None], axis=-1) + skip * u

    u32, delta, A, B, C, skip = (x.astype(jnp.float32) for x in (u, delta, A, B, C, skip))
    final, y = jax.lax.scan(token, initial_state, tuple(jnp.swapaxes(x, 0, 1) for x in (u32, delta, B, C, starts)))
    return jnp.swapaxes(y, 0, 1).astype(u.dtype), final
