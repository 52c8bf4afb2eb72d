"""How much of one token's state is left at another, within a chunk.

With a[t] = dt[t] A and S its running sum, that is exp(S[t] - S[s]): never of a positive number, yet the difference of
two large ones. Each a is cut into a multiple of 1/512, whose sums up to 2^15 float32 holds without rounding, and a rest
below 1/1024, whose sums are small: differences are then as exact as a sum of the terms between.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GRID = 512.0
LEAST = -100.0
"""exp of it is 4e-44: nothing is left."""


class Decay(NamedTuple):
    """Of a chunk of Q tokens. Nothing passes from one document to another."""

    seen: Bool[Array, "b Q Q"]
    """Whether token t (first axis) sees token s: of its document, not later. b is B, or 1 without documents."""
    between: Float[Array, "B G R Q Q"]
    """From token s to token t, 0 where not seen."""
    since: Float[Array, "B G R Q"]
    """From the state before the chunk to token t."""
    until: Float[Array, "B G R Q"]
    """From token s to the state after the chunk."""


class Sums(NamedTuple):
    """Running sums of a[t] over each document of a chunk, the two parts apart."""

    coarse: Float[Array, "B G R Q"]
    fine: Float[Array, "B G R Q"]
    run: Int[Array, "B Q"] | None
    """Documents that began within the chunk up to a token."""
    seen: Bool[Array, "b Q Q"]
    """As in `Decay`."""


def sums(dt: Float[Array, "B G R Q"], A: Float[Array, "G R"], starts: Bool[Array, "B Q"] | None) -> Sums:
    """Of a chunk, with `starts` the tokens that begin a document."""
    size = dt.shape[-1]
    seen = jnp.tril(jnp.ones((1, size, size), bool))
    run = None
    exponent = jnp.maximum(dt * A[:, :, None], LEAST)
    if starts is not None:
        run = jnp.cumsum(starts.astype(jnp.int32), axis=1)
        seen = seen & (run[:, :, None] == run[:, None, :])
        exponent = jnp.where(starts[:, None, None], 0.0, exponent)
    coarse = jnp.round(exponent * GRID) / GRID
    # Sums within each document by a product with the mask: another document's numbers do not even touch the rounding.
    mask = seen.astype(jnp.float32)
    return Sums(_sums(mask, coarse), _sums(mask, exponent - coarse), run, seen)


def decay(dt: Float[Array, "B G R Q"], A: Float[Array, "G R"], starts: Bool[Array, "B Q"] | None) -> Decay:
    """Of a chunk, with `starts` the tokens that begin a document."""
    coarse, fine, run, seen = sums(dt, A, starts)
    reached, lasting = None, None
    if run is not None:
        reached, lasting = (run == 0)[:, None, None], (run == run[:, -1:])[:, None, None]

    def left(coarse: Array, fine: Array, where: Array | None) -> Array:
        total = coarse + fine
        return jnp.exp(total if where is None else jnp.where(where, total, -jnp.inf))

    def apart(x: Array) -> Array:
        return x[..., :, None] - x[..., None, :]

    def to_end(x: Array) -> Array:
        return x[..., -1:] - x

    return Decay(
        seen,
        left(apart(coarse), apart(fine), seen[:, None, None]),
        left(coarse, fine, reached),
        left(to_end(coarse), to_end(fine), lasting),
    )


def remaining(left: Array, x: Array) -> Array:
    """left * x, and 0 where nothing is left: a document whose numbers are too large for float16 becomes infinite, which
    times 0 would be NaN in the others."""
    return jnp.where(left == 0, 0.0, left * x)


def where_any(left: Float[Array, "*b heads Q"], x: Float[Array, "*b Q n"]) -> Float[Array, "*b Q n"]:
    """Sums over heads that `left` weighed, and 0 where nothing is left in any of them; as `remaining`."""
    return jnp.where(jnp.any(left != 0, axis=-2)[..., None], x, 0.0)


def exponent_gradient(
    d_pairs: Float[Array, "B G R Q Q"],
    d_since: Float[Array, "B G R Q"],
    d_until: Float[Array, "B G R Q"],
    d_last: Float[Array, "B G R"],
    seen: Bool[Array, "b Q Q"],
    starts: Bool[Array, "B Q"] | None,
    precision: jax.lax.Precision,
) -> Float[Array, "B G R Q"]:
    """That of a[u], from those of the logarithms of all decays it is part of.

    These are `between[t, s]` for s < u <= t, `since[t]` for u <= t, `until[s]` for s < u, and that from the state
    before the chunk to the state after it. Sums of these terms alone: as a difference of sums over all pairs,
    what a large a leaves of a gradient would drown in rounding. `precision` is that of the sums over pairs.
    """
    size = seen.shape[-1]
    seen = jnp.broadcast_to(seen, (d_pairs.shape[0], size, size))
    ahead = seen & ~jnp.eye(size, dtype=bool)
    before = jnp.einsum("bgrts,bus->bgrtu", d_pairs, ahead.astype(jnp.float32), precision=precision)
    to_end = jnp.where(jnp.swapaxes(ahead, 1, 2)[:, None, None], d_until[..., None], 0.0)
    passing = jnp.where(seen[:, None, None], before + d_since[..., None], to_end)
    d = jnp.sum(passing, axis=3) + d_last[..., None]
    return d if starts is None else jnp.where(starts[:, None, None], 0.0, d)


def _sums(mask: Float[Array, "b Q Q"], x: Float[Array, "B G R Q"]) -> Float[Array, "B G R Q"]:
    mask = jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:]))
    return jnp.einsum("bts,bgrs->bgrt", mask, x, precision=jax.lax.Precision.HIGHEST)
