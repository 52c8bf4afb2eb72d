"""Cases of gated grouped products, and candidates for tile sizes."""

from collections.abc import Mapping

import jax

from llm_jax.kernels.cases import Case, normal, size
from llm_jax.kernels.grouped_matmul.tuning import SHAPE as SHAPE
from llm_jax.kernels.grouped_matmul.tuning import routed
from llm_jax.kernels.grouped_swiglu import grouped_swiglu

CANDIDATES = {
    "gpu": ({"width": (128, 192, 256), "stages": (2, 3, 4), "band": (4, 8, 16)},),
    "tpu": ({"rows": (128, 256, 512), "summed": (1024, 2048, 4096), "made": (256, 512, 1024)},),
}


def make_case(shape: Mapping[str, int], dtype: str) -> Case:
    """Arrays x, gate, up, sizes, rows (None without tokens)."""
    M, K, N, E = (shape[name] for name in ("rows", "inputs", "outputs", "groups"))
    x_key, gate_key, up_key = jax.random.split(jax.random.key(0), 3)
    x = normal(x_key, (shape["tokens"] or M, K), dtype)
    weights = [normal(key, (E, K, N), dtype, K**-0.5) for key in (gate_key, up_key)]
    sizes, rows = routed(shape)

    def call(x, gate, up, sizes, rows, implementation):
        return grouped_swiglu(x, gate, up, sizes, rows=rows, implementation=implementation)

    flops = 4.0 * M * K * N
    least = size(x, *weights, sizes, rows) + M * N * x.dtype.itemsize
    return Case((x, *weights, sizes, rows), call, (0, 1, 2), flops, 2 * flops, least)
