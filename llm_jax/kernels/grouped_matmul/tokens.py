"""Sums of the rows that each token was taken for: the gradient of a gather, in an order that is the same every time."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes

BLOCK = 256
"""Columns."""


def sums_of_tokens(parts: Float[Array, "M K"], rows: Int[Array, " M"], tokens: int) -> Float[Array, "T K"]:
    """out[t] is the sum of the parts[m] with rows[m] = t, each in [0, tokens); in float32 within.

    Nothing scatters, for XLA's scatter-add on a GPU adds in the order in which its atomics come. Rows are sorted by
    token, stable. Where each token has as many as every other, which is what a router with top-k gives, its k parts
    are gathered and added up: one pass. Else neighbours of one token are added in pairs, then pairs of pairs, in
    log2(the most rows of a token) passes, a block of columns after another, as each takes two float32 copies of it.
    """
    most = parts.shape[0]
    if most == 0:
        return manual_axes.full((tokens, parts.shape[1]), 0, parts, parts.dtype)
    order = jnp.argsort(rows, stable=True)
    of_token = rows.at[order].get(mode="promise_in_bounds", unique_indices=True)

    def pairs() -> Array:
        width = min(BLOCK, parts.shape[1])

        def one_block(j: Array, out: Array) -> Array:
            # The last block begins earlier where it would reach over the last column: it makes some columns again.
            block = lax.dynamic_slice_in_dim(parts, j * width, width, axis=1)
            of_rows = block.at[order].get(mode="promise_in_bounds", unique_indices=True)
            return lax.dynamic_update_slice_in_dim(out, _by_pairs(of_rows, of_token, tokens), j * width, axis=1)

        out = manual_axes.full((tokens, parts.shape[1]), 0, (parts, rows), parts.dtype)
        return lax.fori_loop(0, -(-parts.shape[1] // max(1, width)), one_block, out)

    if most % tokens:
        return pairs()
    places = order.reshape(tokens, -1)

    def one_pass() -> Array:
        own = parts.at[places].get(mode="promise_in_bounds", unique_indices=True)
        return own.sum(1, dtype=jnp.float32).astype(parts.dtype)

    even = jnp.all(of_token.reshape(places.shape) == jnp.arange(tokens, dtype=rows.dtype)[:, None])
    return lax.cond(even, one_pass, pairs)


def _by_pairs(parts: Float[Array, "M K"], of_token: Int[Array, " M"], tokens: int) -> Float[Array, "T K"]:
    """Of parts that are sorted by token."""
    most = parts.shape[0]
    numbers = jnp.arange(tokens, dtype=of_token.dtype)
    begin, end = (jnp.searchsorted(of_token, numbers, side=side).astype(jnp.int32) for side in ("left", "right"))
    at = jnp.arange(most, dtype=jnp.int32)
    place = at - begin[of_token]
    left = end[of_token] - at

    def add(step: Array, totals: Array) -> Array:
        width = jnp.left_shift(1, step).astype(jnp.int32)
        other = totals.at[jnp.minimum(at + width, most - 1)].get(mode="promise_in_bounds")
        adds = (place % (2 * width) == 0) & (left > width)
        return totals + jnp.where(adds[:, None], other, 0.0)

    passes = 32 - lax.clz(jnp.max(end - begin) - 1)
    totals = lax.fori_loop(0, passes, add, parts.astype(jnp.float32))
    mine = totals.at[jnp.minimum(begin, most - 1)].get(mode="promise_in_bounds")
    return jnp.where((end > begin)[:, None], mine, 0.0).astype(parts.dtype)
