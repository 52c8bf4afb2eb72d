"""SwiGLU number by number (Shazeer 2020, arXiv:2002.05202), in float32 within."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def activated(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float32: silu(gate) * up."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return gate * jax.nn.sigmoid(gate) * up


def gradients(
    gate: Float[Array, "*shape"], up: Float[Array, "*shape"], g: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Those of `gate` and `up`, in g's dtype, where g is that of the result."""
    gate, up, g32 = (x.astype(jnp.float32) for x in (gate, up, g))
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = g32 * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    # Each of the two makes the sigmoid for itself; shared, it is an array that is written and read again.
    gate = jax.lax.optimization_barrier(gate)
    return d_gate.astype(g.dtype), (g32 * gate * jax.nn.sigmoid(gate)).astype(g.dtype)
