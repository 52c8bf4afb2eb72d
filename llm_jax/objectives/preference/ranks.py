"""Matching by rank over a batch: optimal transport of one set of numbers onto another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def equal_rank(
    own: Float[Array, "*batch"], other: Float[Array, "*batch"], present: Bool[Array, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    """For each of `own` the one of `other` that has the same rank among its kind, without gradient.

    Args:
        own, other: numbers of the whole batch, any one shape.
        present: False where there is no example; 0 is returned there.
    """
    present = jnp.ones(own.shape, bool) if present is None else present
    # The absent come last in both, so that the ranks of the others are of one count.
    first, second = (jax.lax.stop_gradient(jnp.where(present, x, jnp.inf)).ravel() for x in (own, other))
    matched = jnp.zeros_like(second).at[jnp.argsort(first)].set(jnp.sort(second))
    return jnp.where(present, matched.reshape(own.shape), 0.0)
