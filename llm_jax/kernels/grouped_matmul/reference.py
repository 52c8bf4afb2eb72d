"""Every row with every group's weights, in float32; the row's own is kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels.grouped_matmul.spec import GroupedSpec


def supports(spec: GroupedSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def product(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "M N"]:
    """Rows of x, or those that `rows` takes from it, times the weights of their group, 0 behind the last group."""
    x = x if rows is None else x[rows]
    every = jnp.einsum("mk,ekn->men", x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(_members(spec, group_sizes)[..., None], every, 0.0).sum(1).astype(x.dtype)


def input_gradient(
    spec: GroupedSpec, g: Float[Array, "M N"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M K"]:
    """Rows of g times the transposed weights of their group."""
    return product(spec, g, jnp.swapaxes(w, 1, 2), group_sizes)


def weight_gradient(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    g: Float[Array, "M N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "E K N"]:
    """Per group the sum over its rows of x ⊗ g, 0 of an empty one."""
    x = x if rows is None else x[rows]
    members = _members(spec, group_sizes)[..., None]
    x, g = (jnp.where(members, a[:, None].astype(jnp.float32), 0.0) for a in (x, g))
    return jnp.einsum("mek,men->ekn", x, g, precision=jax.lax.Precision.HIGHEST).astype(spec.dtype)


def _members(spec: GroupedSpec, group_sizes: Array) -> Bool[Array, "M E"]:
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(spec.rows)[:, None]
    return (rows < ends) & (rows >= ends - group_sizes)
