"""Cases of grouped products, and candidates for tile sizes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import Case, normal, size
from llm_jax.kernels.grouped_matmul import grouped_matmul

SHAPE = {"rows": 16384, "inputs": 4096, "outputs": 14336, "groups": 8}
CANDIDATES = {
    "gpu": ({"width": (128, 192, 256), "stages": (3, 4, 5, 6), "band": (4, 8, 16)},),
    "tpu": ({"rows": (128, 256, 512, 1024), "summed": (1024, 2048, 4096), "made": (512, 1024, 2048)},),
}


def make_case(shape: Mapping[str, int], dtype: str) -> Case:
    """Every row has a group of its own drawing, so groups have about one size."""
    M, K, N, E = (shape[name] for name in ("rows", "inputs", "outputs", "groups"))
    x_key, w_key = jax.random.split(jax.random.key(0))
    x, w = normal(x_key, (M, K), dtype), normal(w_key, (E, K, N), dtype, K**-0.5)
    sizes = jnp.asarray(np.bincount(np.random.default_rng(0).integers(0, E, M), minlength=E), jnp.int32)

    def call(x, w, sizes, implementation):
        return grouped_matmul(x, w, sizes, implementation=implementation)

    flops = 2.0 * M * K * N
    return Case((x, w, sizes), call, (0, 1), flops, 2 * flops, size(x, w, sizes) + M * N * x.dtype.itemsize)
