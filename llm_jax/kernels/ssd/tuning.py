"""Cases of Mamba-2's scan, and candidates for tile sizes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llm_jax.kernels.cases import Case, normal, size
from llm_jax.kernels.ssd import ssd

SHAPE = {"batch": 1, "length": 4096, "heads": 80, "head_dim": 64, "groups": 1, "states": 128}
CANDIDATES = {
    "gpu": ({"heads": (2, 4, 8, 16, 32)}, {"product_heads": (4, 8, 16, 32)}),
    "tpu": ({"chunk": (128, 256), "lanes": (128, 256, 512, 1024)},),
}
CHUNK = 128
"""Of which flops are counted; the op may take other chunks."""


def make_case(shape: Mapping[str, int], dtype: str) -> Case:
    """Flops: scores of a chunk's tokens (half of them seen), their product with x, states in and out."""
    B, T, H, P, G, N = (shape[name] for name in SHAPE)
    keys = jax.random.split(jax.random.key(0), 5)
    x = normal(keys[0], (B, T, H, P), dtype)
    dt = jax.nn.softplus(normal(keys[1], (B, T, H), jnp.float32) - 2)
    A = -jnp.exp(normal(keys[2], (H,), jnp.float32))
    b, c = (normal(key, (B, T, G, N), dtype, N**-0.5) for key in keys[3:])

    def call(x, dt, A, b, c, implementation):
        return ssd(x, dt, A, b, c, implementation=implementation)

    flops = 2.0 * B * T * (CHUNK / 2 * (G * N + H * P) + 2 * H * N * P)
    return Case((x, dt, A, b, c), call, (0, 1, 2, 3, 4), flops, 2 * flops, size(x, dt, A, b, c) + size(x))
