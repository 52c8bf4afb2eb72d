"""On a CPU blocks of rows, as `grouped_matmul` cuts them, with both products of a block at once. Elsewhere two grouped
products by XLA.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels import swiglu as numbers
from llm_jax.kernels.grouped_matmul import xla as products
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.platform import target_platform


def supports(spec: GroupedSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def swiglu(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "M N"]:
    """silu(rows times gate) * (rows times up), 0 behind the last group."""
    if target_platform() != "cpu":
        made = (products.product(spec, x, w, group_sizes, rows) for w in (gate, up))
        return numbers.activated(*made).astype(x.dtype)

    def make(x: Array, gate: Array, up: Array) -> Array:
        return numbers.activated(*(products.dot(x, w, 1, 0) for w in (gate, up))).astype(x.dtype)

    return products.of_blocks(spec, [x], [gate, up], group_sizes, spec.outputs, make, rows)


def input_gradient(
    spec: GroupedSpec,
    d_gate: Float[Array, "M N"],
    d_up: Float[Array, "M N"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
) -> Float[Array, "M K"]:
    """Rows of both gradients times the transposed weights of their group, the two added up in float32."""

    def total(of_gate: Array, of_up: Array) -> Array:
        return (of_gate.astype(jnp.float32) + of_up.astype(jnp.float32)).astype(d_gate.dtype)

    if target_platform() != "cpu":
        return total(*(products.input_gradient(spec, a, w, group_sizes) for a, w in ((d_gate, gate), (d_up, up))))

    def make(d_gate: Array, d_up: Array, gate: Array, up: Array) -> Array:
        return total(products.dot(d_gate, gate, 1, 1), products.dot(d_up, up, 1, 1))

    return products.of_blocks(spec, [d_gate, d_up], [gate, up], group_sizes, spec.inputs, make)
