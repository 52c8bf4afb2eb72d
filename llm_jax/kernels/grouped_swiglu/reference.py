"""SwiGLU of two grouped products, each as `grouped_matmul`'s reference makes it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels import swiglu as numbers
from llm_jax.kernels.grouped_matmul import reference as products
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec


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
    made = (products.product(spec, x, w, group_sizes, rows) for w in (gate, up))
    return numbers.activated(*made).astype(x.dtype)


def input_gradient(
    spec: GroupedSpec,
    d_gate: Float[Array, "M N"],
    d_up: Float[Array, "M N"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
) -> Float[Array, "M K"]:
    """Rows of both gradients times the transposed weights of their group, added up in float32."""
    of_gate, of_up = (
        products.input_gradient(spec, a.astype(jnp.float32), w.astype(jnp.float32), group_sizes)
        for a, w in ((d_gate, gate), (d_up, up))
    )
    return (of_gate + of_up).astype(d_gate.dtype)
