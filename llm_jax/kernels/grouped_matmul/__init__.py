"""Products of rows, sorted by group, with the weights of their group: the experts' projections."""

from functools import partial

import jax
from jaxtyping import Array, Float, Int

from llm_jax.kernels import debug, manual_axes
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.grouped_matmul import gpu, reference, tpu, xla
from llm_jax.kernels.grouped_matmul.spec import (
    GroupedSpec,
    check_sizes,
    grouped_matmul_spec,
    within_rows,
)

OP = Op(
    "grouped_matmul",
    grouped_matmul_spec,
    {"gpu": gpu, "tpu": tpu, "xla": xla, "reference": reference},
    order=("gpu", "tpu", "xla"),
)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """x[m] @ w[e] for the rows of group e: the first group_sizes[0] rows are of group 0, and so on.

    Rows behind the last group give 0 and get gradient 0. Groups may be empty. In x's dtype with float32 sums; float32
    means precision HIGHEST. Gradients flow to x and w, reverse mode only.

    Args:
        x, w: one dtype of float32, bfloat16, float16.
        group_sizes: rows of each group, at least 0, adding up to M at most.
        implementation: "gpu", "tpu", "xla" or "reference"; None takes the best one for the machine.

    Raises:
        ArgumentError: shapes or dtypes that do not fit, or an unknown implementation; in debug mode (`kernels.debug`)
            also group sizes below 0 or beyond the rows, which out of debug mode are cut to what is there.
    """
    spec = grouped_matmul_spec(x, w, group_sizes)
    debug.check_values(partial(check_sizes, OP.name, spec), group_sizes)
    name = choose(OP, spec, implementation)
    group_sizes = within_rows(spec, group_sizes)
    x, w, group_sizes = manual_axes.vary((x, w, group_sizes), manual_axes.axes_of(x, w, group_sizes))
    return _product(name, spec, x, w, group_sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(name: str, spec: GroupedSpec, x: Array, w: Array, group_sizes: Array) -> Array:
    return OP.implementations[name].product(spec, x, w, group_sizes)


def _forward(name: str, spec: GroupedSpec, x: Array, w: Array, group_sizes: Array):
    return _product(name, spec, x, w, group_sizes), (x, w, group_sizes)


def _backward(name: str, spec: GroupedSpec, saved: tuple[Array, Array, Array], g: Array):
    x, w, group_sizes = saved
    implementation = OP.implementations[name]
    d_x = implementation.input_gradient(spec, g, w, group_sizes)
    return d_x, implementation.weight_gradient(spec, x, g, group_sizes), None


_product.defvjp(_forward, _backward)
