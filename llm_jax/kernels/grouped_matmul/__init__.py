"""Products of rows, sorted by group, with the weights of their group: the experts' projections."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels import debug, manual_axes
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.grouped_matmul import gpu, reference, tpu, xla
from llm_jax.kernels.grouped_matmul.spec import (
    GroupedSpec,
    check_rows,
    check_sizes,
    grouped_matmul_spec,
    within_rows,
    within_tokens,
)
from llm_jax.kernels.grouped_matmul.tokens import sums_of_tokens

OP = Op(
    "grouped_matmul",
    grouped_matmul_spec,
    {"gpu": gpu, "tpu": tpu, "xla": xla, "reference": reference},
    order=("gpu", "tpu", "xla"),
)


def grouped_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    *,
    rows: Int[Array, " M"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """x[m] @ w[e] for the rows of group e: the first group_sizes[0] rows are of group 0, and so on.

    Rows behind the last group give 0 and get gradient 0. Groups may be empty. In x's dtype with float32 sums; float32
    means precision HIGHEST. Gradients flow to x and w, reverse mode only.

    With `rows` it is x[rows[m]] @ w[e], of tokens x as a router with top-k sends them: order = argsort(experts.ravel(),
    stable=True), rows = order // k. x[rows] is not written, forward and for the weights' gradient: "gpu" copies each
    row from where it lies in x to the tile that is multiplied, "tpu" too, from a copy of x in words of 32 bits, and
    "xla" takes a block at a time on a CPU; elsewhere it, and the reference, write x[rows]. The gradient of x is made
    for each row, M of them, and summed per token in an order that is the same every time (see `sums_of_tokens`).

    Args:
        x, w: one dtype of float32, bfloat16, float16.
        group_sizes: rows of each group, at least 0, adding up to M at most.
        rows: which row of x, a token, each row of the product is made from, in [0, T); a token may come any number of
            times. None: row m is x[m], and M is T.
        implementation: "gpu", "tpu", "xla" or "reference"; None takes the best one for the machine.

    Raises:
        ArgumentError: shapes or dtypes that do not fit, or an unknown implementation; in debug mode (`kernels.debug`)
            also group sizes below 0 or beyond the rows, and rows that x has not, which out of debug mode are cut to
            what is there.
    """
    spec = grouped_matmul_spec(x, w, group_sizes, rows=rows)
    name = choose(OP, spec, implementation)
    group_sizes, rows = checked(OP.name, spec, x, group_sizes, rows)
    arrays = jax.tree.map(jnp.asarray, (x, w, group_sizes, rows))  # a traced number picks from no numpy array
    return _product(name, spec, *manual_axes.vary(arrays, manual_axes.axes_of(arrays)))


def checked(op: str, spec: GroupedSpec, x: Array, group_sizes: Array, rows: Array | None) -> tuple[Array, Array | None]:
    """Sizes and rows as kernels take them: what is not there is named in debug mode, and cut to what is there."""
    debug.check_values(partial(check_sizes, op, spec), group_sizes)
    if rows is not None:
        debug.check_values(partial(check_rows, op, spec), rows)
        rows = within_tokens(rows, x.shape[0])
    return within_rows(spec, group_sizes), rows


def of_rows(spec: GroupedSpec) -> GroupedSpec:
    """The call whose rows are there: the input gradient is the same, wherever they are taken from."""
    return replace(spec, tokens=None)


def of_tokens(
    x: Float[Array, "T K"], d_rows: Float[Array, "M K"], rows: Int[Array, " M"] | None
) -> Float[Array, "T K"]:
    """The gradient of x, from that of each row."""
    return d_rows if rows is None else sums_of_tokens(d_rows, rows, x.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(name: str, spec: GroupedSpec, x: Array, w: Array, group_sizes: Array, rows: Array | None) -> Array:
    return OP.implementations[name].product(spec, x, w, group_sizes, rows)


def _forward(name: str, spec: GroupedSpec, x: Array, w: Array, group_sizes: Array, rows: Array | None):
    return _product(name, spec, x, w, group_sizes, rows), (x, w, group_sizes, rows)


def _backward(name: str, spec: GroupedSpec, saved: tuple[Array, Array, Array, Array | None], g: Array):
    x, w, group_sizes, rows = saved
    implementation = OP.implementations[name]
    d_x = of_tokens(x, implementation.input_gradient(of_rows(spec), g, w, group_sizes), rows)
    return d_x, implementation.weight_gradient(spec, x, g, group_sizes, rows), None, None


_product.defvjp(_forward, _backward)
