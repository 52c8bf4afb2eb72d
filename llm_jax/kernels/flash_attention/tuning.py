"""Attention's cases and candidates for tile sizes."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cases import Case, normal, size
from llm_jax.kernels.flash_attention import flash_attention

SHAPE = {
    "batch": 1,
    "q_len": 4096,
    "kv_len": 0,  # as q_len
    "heads": 32,
    "kv_heads": 0,  # as heads
    "head_dim": 128,
    "value_dim": 0,  # as head_dim
    "causal": 1,
    "window": 0,  # none
    "document": 0,  # tokens of each packed document; not packed
    "softcap": 0,  # none
    "alibi": 0,
    "sinks": 0,
}
CANDIDATES = {
    "gpu": ({"q_block": (64, 128), "kv_block": (64, 96, 128, 160, 256), "stages": (2, 3), "producer": (0, 1)},),
    "gpu_backward": (
        {"dq_q_block": (64, 128), "dq_kv_block": (32, 64, 128), "dq_stages": (2, 3)},
        {"dkv_kv_block": (64, 128), "dkv_q_block": (32, 64, 128), "dkv_stages": (2, 3), "dkv_panels": (1, 2)},
    ),
    "tpu": (
        {"q": (256, 512, 1024, 2048), "kv": (256, 512, 1024, 2048)},
        {"dq_q": (256, 512, 1024), "dq_kv": (256, 512, 1024)},
        {"dkv_q": (256, 512, 1024), "dkv_kv": (256, 512, 1024)},
    ),
    "xla": ({"block": (64, 128, 256, 512, 1024), "tile_mib": (1, 4, 16, 64, 256)}, {"apart": (0, 1)}),
}


def make_case(shape: Mapping[str, int], dtype: str) -> Case:
    """Backward flops are those of five products (2.5 times the forward's), whatever is computed twice."""
    B, T, N, H = (shape[name] for name in ("batch", "q_len", "heads", "head_dim"))
    S, K, Hv = shape["kv_len"] or T, shape["kv_heads"] or N, shape["value_dim"] or H
    sizes = ((B, T, N, H), (B, S, K, H), (B, S, K, Hv))
    q, k, v = (normal(key, s, dtype) for key, s in zip(jax.random.split(jax.random.key(0), 3), sizes))
    segments = slopes = sinks = None
    if shape["document"]:
        segments = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // shape["document"] + 1, (B, T))
    if shape["alibi"]:
        slopes = 2.0 ** -jnp.linspace(1, 8, N)
    if shape["sinks"]:
        sinks = jnp.linspace(-2, 2, N)

    def call(q, k, v, implementation):
        return flash_attention(
            q,
            k,
            v,
            causal=bool(shape["causal"]),
            window=shape["window"] or None,
            softcap=float(shape["softcap"]) or None,
            alibi_slopes=slopes,
            sinks=sinks,
            segment_ids=segments,
            implementation=implementation,
        )

    flops = 2.0 * B * N * visible_pairs(shape) * (H + Hv)
    traffic = size(q, k, v) + B * T * N * Hv * q.dtype.itemsize
    return Case((q, k, v), call, (0, 1, 2), flops, 2.5 * flops, traffic)


def visible_pairs(shape: Mapping[str, int]) -> int:
    """How many pairs of query and key a head of a row has."""
    T, S = shape["q_len"], shape["kv_len"] or shape["q_len"]
    i = np.arange(T) + S - T
    low, high = np.zeros_like(i), np.full_like(i, S - 1)
    if shape["causal"]:
        high = i
    if shape["window"]:
        low = np.maximum(low, i - shape["window"] + 1)
        high = np.minimum(high, i + shape["window"] - 1)
    if shape["document"]:
        low = np.maximum(low, i // shape["document"] * shape["document"])
        high = np.minimum(high, (i // shape["document"] + 1) * shape["document"] - 1)
    return int(np.maximum(high - low + 1, 0).sum())
