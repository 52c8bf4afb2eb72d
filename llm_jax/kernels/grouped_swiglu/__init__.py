"""The gated half of experts: two products of rows, sorted by group, with the weights of their group, and SwiGLU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes, swiglu
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.grouped_matmul import OP as PRODUCTS
from llm_jax.kernels.grouped_matmul import checked, of_rows, of_tokens
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.grouped_swiglu import gpu, reference, tpu, xla
from llm_jax.kernels.grouped_swiglu.spec import grouped_swiglu_spec

OP = Op(
    "grouped_swiglu",
    grouped_swiglu_spec,
    {"gpu": gpu, "tpu": tpu, "xla": xla, "reference": reference},
    order=("gpu", "tpu", "xla"),
)
SAVED = "grouped_swiglu"
"""Name (`checkpoint_name`) of the two products, which are what the backward pass needs of the forward pass."""


def grouped_swiglu(
    x: Float[Array, "T K"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    *,
    rows: Int[Array, " M"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """silu(x[m] @ gate[e]) * (x[m] @ up[e]) for the rows of group e, which are sorted as for `grouped_matmul`.

    Both products are rounded to x's dtype, and the result once more; sums and SwiGLU are float32. Rows behind the last
    group give 0 and get gradient 0. Groups may be empty. Gradients flow to x, gate and up, reverse mode only.

    The products are not written, unless the call is differentiated: then they are kept, under the name SAVED, and the
    result is made from them outside of the kernels. So a policy that saves them makes it again without a product.

    With `rows`, row m is x[rows[m]], as in `grouped_matmul`.

    Args:
        x, gate, up: one dtype of float32, bfloat16, float16.
        group_sizes: rows of each group, at least 0, adding up to M at most.
        rows: which row of x each row of the product is made from, in [0, T); None: row m is x[m], and M is T.
        implementation: "gpu", "tpu", "xla" or "reference"; None takes the best one for the machine.

    Raises:
        ArgumentError: as `grouped_matmul`.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    spec = grouped_swiglu_spec(x, gate, up, group_sizes, rows=rows)
    name = choose(OP, spec, implementation)
    arrays = jax.tree.map(jnp.asarray, (x, gate, up, *checked(OP.name, spec, x, group_sizes, rows)))
    return _swiglu(name, spec, *manual_axes.vary(arrays, manual_axes.axes_of(arrays)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(
    name: str, spec: GroupedSpec, x: Array, gate: Array, up: Array, group_sizes: Array, rows: Array | None
) -> Array:
    return OP.implementations[name].swiglu(spec, x, gate, up, group_sizes, rows)


def _forward(
    name: str, spec: GroupedSpec, x: Array, gate: Array, up: Array, group_sizes: Array, rows: Array | None
) -> tuple[Array, Any]:
    product = PRODUCTS.implementations[name].product
    products = tuple(checkpoint_name(product(spec, x, w, group_sizes, rows), SAVED) for w in (gate, up))
    return swiglu.activated(*products).astype(x.dtype), (x, gate, up, group_sizes, rows, *products)


def _backward(name: str, spec: GroupedSpec, saved: Any, g: Array):
    x, gate, up, group_sizes, rows, of_gate, of_up = saved
    d_gate, d_up = swiglu.gradients(of_gate, of_up, g)
    d_x = OP.implementations[name].input_gradient(of_rows(spec), d_gate, d_up, gate, up, group_sizes)
    of_weights = PRODUCTS.implementations[name].weight_gradient
    d_weights = (of_weights(spec, x, d, group_sizes, rows) for d in (d_gate, d_up))
    return of_tokens(x, d_x, rows), *d_weights, None, None


_swiglu.defvjp(_forward, _backward)
