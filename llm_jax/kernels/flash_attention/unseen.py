"""What no query may see can hold anything (padding, free slots of a cache), NaN too: 0 · NaN must not reach a sum."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels.flash_attention.spec import AttentionSpec, may_hold_unseen


def for_forward(
    spec: AttentionSpec, k: Float[Array, "B S K H"], v: Float[Array, "B S K Hv"]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Keys and values whose products with weights of 0 are 0.

    A value that is not finite becomes 0 and its key NaN: whoever does see it still gets NaN, by the scores.
    """
    return (_finite(k, jnp.nan, v), _finite(v, 0)) if may_hold_unseen(spec) else (k, v)


def for_backward(spec: AttentionSpec, *arrays: Float[Array, "B length heads size"]) -> tuple[Array, ...]:
    """Queries, keys and values likewise. Those who saw what is not finite have NaN as their log-sum-exp."""
    return tuple(_finite(x, 0) for x in arrays) if may_hold_unseen(spec) else arrays


def _finite(x: Float[Array, "B length heads size"], instead: float, *others: Array) -> Array:
    """x with `instead` in the rows in which it, or one of the others, is not finite."""
    finite = [jnp.isfinite(y).all(-1, keepdims=True) for y in (x, *others)]
    return jnp.where(functools.reduce(jnp.logical_and, finite), x, instead)
