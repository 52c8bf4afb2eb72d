"""Tokens that count come first, so that the work ends with them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


class TokenOrder(NamedTuple):
    """Tokens with those of the mask first, padded to whole chunks."""

    positions: Array | None
    """Where each token goes; None: where it is."""
    sources: Array | None
    """Which token comes to each place."""
    active: Array | None
    padding: int

    def gather(self, tree: Any) -> Any:
        """Arrays over tokens in the new order, 0 behind the active ones."""

        def move(x: Array) -> Array:
            x = jnp.pad(x, ((0, self.padding), *((0, 0),) * (x.ndim - 1)))
            if self.sources is None or self.active is None:
                return x
            x = x.at[self.sources].get(mode="promise_in_bounds", unique_indices=True)
            active = jnp.arange(x.shape[0]) < self.active
            # Whatever a masked token holds, NaN included, stays out of the head's gradient.
            return jnp.where(active.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

        return jax.tree.map(move, tree)

    def scatter(self, tree: Any) -> Any:
        """The inverse, without the padding."""

        def move(x: Array) -> Array:
            x = x if self.positions is None else x.at[self.positions].get(mode="promise_in_bounds", unique_indices=True)
            return x[: x.shape[0] - self.padding]

        return jax.tree.map(move, tree)


def token_order(mask: Bool[Array, " M"] | None, padding: int) -> TokenOrder:
    """The order for a call with this mask, with `padding` empty places at the end."""
    if mask is None:
        return TokenOrder(None, None, None, padding)
    mask = jnp.pad(mask, (0, padding))
    active = mask.sum()
    positions = jnp.where(mask, jnp.cumsum(mask) - 1, active + jnp.cumsum(~mask) - 1)
    places = jnp.arange(mask.shape[0])
    sources = jnp.zeros_like(places).at[positions].set(places, unique_indices=True)
    return TokenOrder(positions, sources, active, padding)
