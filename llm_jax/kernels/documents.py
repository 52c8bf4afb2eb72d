"""Documents of a packed row, for ops that carry something from token to token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The documents of each row numbered from 1, in order; 0 for padding (segment id 0), wherever it lies.

    A token begins a document if its segment id is not that of the last real token before it. The first real token of
    a row begins none: it goes on from the state that the row came with.
    """
    real = segment_ids > 0
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    last_real = jax.lax.cummax(jnp.where(real, places, -1), axis=1)
    before = jnp.pad(last_real, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    begins = real & (before >= 0) & (segment_ids != previous)
    return jnp.where(real, 1 + jnp.cumsum(begins.astype(jnp.int32), axis=1), 0)


def starts(run: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Tokens that begin a document other than their row's first; from `runs`."""
    highest = jax.lax.cummax(jnp.maximum(run, 1), axis=1)
    return run > jnp.pad(highest, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
