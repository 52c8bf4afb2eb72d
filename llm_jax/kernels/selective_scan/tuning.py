"""Cases of Mamba's scan, and candidates for tile sizes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llm_jax.kernels.cases import Case, normal, size
from llm_jax.kernels.selective_scan import selective_scan

SHAPE = {"batch": 1, "length": 4096, "channels": 5120, "states": 16}
CANDIDATES = {
    "gpu": ({"chunk": (8, 16, 32)},),
    "tpu": ({"chunk": (64, 128, 256, 512), "lanes": (128, 256, 512, 1024)},),
}


def make_case(shape: Mapping[str, int], dtype: str) -> Case:
    """No products of matrices: what counts is traffic."""
    B, T, D, N = (shape[name] for name in SHAPE)
    keys = jax.random.split(jax.random.key(0), 5)
    u = normal(keys[0], (B, T, D), dtype)
    delta = jax.nn.softplus(normal(keys[1], (B, T, D), jnp.float32) - 2).astype(dtype)
    A = -jnp.exp(normal(keys[2], (D, N), jnp.float32))
    b, c = (normal(key, (B, T, N), dtype) for key in keys[3:])

    def call(u, delta, A, b, c, implementation):
        return selective_scan(u, delta, A, b, c, implementation=implementation)

    return Case((u, delta, A, b, c), call, (0, 1, 2, 3, 4), bytes=size(u, delta, A, b, c) + size(u))
