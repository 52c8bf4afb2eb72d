"""What the tests of grouped_matmul share: sizes of groups, arrays, the formula, a call with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import grouped_matmul

ROWS = 45
NAMES = "product", "input gradient", "weight gradient"
SIZES = {
    "uneven": [3, 17, 1, 9, 15],
    "empty groups": [0, 20, 0, 25, 0],
    "one group": [0, 0, 45, 0, 0],
    "rows behind": [7, 0, 11, 0, 5],
    "nothing": [0, 0, 0, 0, 0],
}


def arrays(dtype, inputs, outputs, seed=0, rows=ROWS):
    """x, w and the cotangent of the product."""
    rng = np.random.default_rng(seed)
    shapes = (rows, inputs), (5, inputs, outputs), (rows, outputs)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def formula(x, w, g, sizes):
    """Products of the groups one after another, and both gradients, in float64."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    out, d_x, d_w = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    for e, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[e], end)
        out[rows], d_x[rows], d_w[e] = x[rows] @ w[e], g[rows] @ w[e].T, x[rows].T @ g[rows]
    return out, d_x, d_w


@functools.cache
def compiled(implementation):
    """(x, w, g, sizes) -> the product and both gradients; sizes are data, so one program serves them all."""

    @jax.jit
    def run(x, w, g, sizes):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return out, *pull(g)

    return lambda x, w, g, sizes: run(x, w, g, jnp.asarray(sizes, jnp.int32))
