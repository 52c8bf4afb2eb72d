"""Cases of attention over pages."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import Case, normal, size
from llm_jax.kernels.choice import ArgumentError
from llm_jax.kernels.ragged_paged_attention import Pages, ragged_paged_attention

SHAPE = {
    "requests": 64,
    "kv_len": 4096,  # of each request
    "q_len": 1,  # new tokens of each: 1 in decoding
    "page_size": 64,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
}
CANDIDATES = {
    "gpu": ({"rows": (64, 128), "block": (64, 128), "stages": (2, 3, 4)},),
    "tpu": ({"rows": (64, 128, 256, 512), "block": (128, 256, 512, 1024, 2048)},),
}


def make_case(shape: Mapping[str, int], dtype: str) -> Case:
    """Pages in random order, all of them used; nothing is differentiated."""
    R, L, T, S, N, K, H = (shape[name] for name in SHAPE)
    if T > L:
        raise ArgumentError(f"ragged_paged_attention: q_len={T} is more than kv_len={L}")
    table = -(-L // S)
    keys = jax.random.split(jax.random.key(0), 3)
    pages = Pages(*(normal(key, (R * table, K, S, H), dtype) for key in keys[:2]))
    q = normal(keys[2], (R * T, N, H), dtype)
    order = np.random.default_rng(0).permutation(R * table).reshape(R, table)
    batch = jnp.full(R, L, jnp.int32), jnp.asarray(order, jnp.int32), jnp.arange(R + 1, dtype=jnp.int32) * T

    def call(q, pages, kv_lens, page_tables, cu_q_lens, implementation):
        return ragged_paged_attention(q, pages, kv_lens, page_tables, cu_q_lens, implementation=implementation)

    pairs = R * (T * (L - T) + T * (T + 1) / 2)
    read = size(q, batch) + R * L * 2 * K * H * q.dtype.itemsize
    return Case((q, pages, *batch), call, flops=4.0 * pairs * N * H, bytes=read + size(q))
