"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, eq. 34), in the half-split layout of Hugging Face."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rotation = tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]


def rotation(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """float32 cosines and sines of `position * theta ** (-2i / head_dim)`, shared by all layers and heads."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@jax.custom_vjp
def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turns the pairs (i, i + H/2) of each head, in float32; the result has the dtype of `x`.

    The angles take no gradient.
    """
    cos, sin = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    # Stacked before the last axis, not concatenated along it: on a CPU one pass over memory instead of two.
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)


def _rotate_forward(x: Array, by: Rotation) -> tuple[Array, Rotation]:
    return rotate(x, by), by


def _rotate_backward(by: Rotation, g: Array) -> tuple[Array, None]:
    """Turned back."""
    cos, sin = by
    return rotate(g, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)
