"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, eq. 34), in the half-split layout of Hugging Face."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rotation = tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]


def rotation(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """float32 cosines and sines of `position * theta ** (-2i / head_dim)`, shared by all layers and heads."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turns the pairs (i, i + H/2) of each head, in float32; the result has the dtype of `x`."""
    cos, sin = (angle[..., None, :] for angle in by)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    # The other half by a reversal and not by a concatenation: on a CPU that is a pass over memory of its own.
    turned = halves * cos + halves[..., ::-1, :] * jnp.concatenate([-sin, sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)
