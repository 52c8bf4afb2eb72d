"""Cases of grouped products, and candidates for tile sizes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llm_jax.kernels.cases import Case, normal, size
from llm_jax.kernels.grouped_matmul import grouped_matmul

SHAPE = {"rows": 16384, "inputs": 4096, "outputs": 14336, "groups": 8, "tokens": 0}
"""`tokens`: what the rows are taken from; 0: they are there."""
CANDIDATES = {
    "gpu": ({"width": (128, 192, 256), "stages": (3, 4, 5, 6), "band": (4, 8, 16)},),
    "tpu": ({"rows": (128, 256, 512, 1024), "summed": (1024, 2048, 4096), "made": (512, 1024, 2048)},),
}


def make_case(shape: Mapping[str, int], dtype: str) -> Case:
    """Arrays x, w, sizes, rows (None without tokens)."""
    M, K, N, E = (shape[name] for name in ("rows", "inputs", "outputs", "groups"))
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = normal(x_key, (shape["tokens"] or M, K), dtype), normal(w_key, (E, K, N), dtype, K**-0.5)
    sizes, rows = routed(shape)

    def call(x, w, sizes, rows, implementation):
        return grouped_matmul(x, w, sizes, rows=rows, implementation=implementation)

    flops = 2.0 * M * K * N
    return Case((x, w, sizes, rows), call, (0, 1), flops, 2 * flops, size(x, w, sizes, rows) + M * N * x.dtype.itemsize)


def routed(shape: Mapping[str, int]) -> tuple[Array, Array | None]:
    """Rows of each group, and the token of each row, in the order of tokens within a group, as a router leaves them.

    Every row has a group of its own drawing, so groups have about one size. Tokens have rows in turn.
    """
    M, E, T = (shape[name] for name in ("rows", "groups", "tokens"))
    groups = np.random.default_rng(0).integers(0, E, M)
    sizes = jnp.asarray(np.bincount(groups, minlength=E), jnp.int32)
    if not T:
        return sizes, None
    order = np.lexsort((np.arange(M) % T, groups))
    return sizes, jnp.asarray(order % T, jnp.int32)
