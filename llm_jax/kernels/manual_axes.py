"""Inside `shard_map`, JAX tracks the mesh axes over which a value may differ; a loop's carry must keep them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def axes_of(*arrays: Any) -> frozenset[str]:
    """The mesh axes over which any of the arrays may differ; empty outside of `shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The same values, marked as differing over `axes`. The gradient of the marking is the sum over them."""

    def mark(x: Array) -> Array:
        missing = tuple(sorted(axes - axes_of(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def full(shape: Sequence[int], value: float, like: Any, dtype: Any = jnp.float32) -> Array:
    """A constant array that varies over the same mesh axes as the arrays of `like`."""
    return vary(jnp.full(shape, value, dtype), axes_of(like))


def like(x: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The type of a kernel's output that varies over the same mesh axes as `x`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
