"""What a call of `decode_attention` asks for."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DecodeSpec:
    """The static part of a call."""

    batch: int
    slots: int
    heads: int
    kv_heads: int
    dtype: str
    scale: float

    @property
    def group(self) -> int:
        """Query heads per key and value head."""
        return self.heads // self.kv_heads


def decode_attention_spec(q: Any, k: Any, v: Any, lengths: Any, *, scale: float | None = None) -> DecodeSpec:
    """Checks a call, arguments as for `decode_attention`; raises ArgumentError."""
    if len(q.shape) != 3 or len(k.shape) != 4 or len(v.shape) != 4:
        raise _error(f"q must be [B, N, H], k and v [B, K, S, H]; got {q.shape}, {k.shape}, {v.shape}")
    (B, N, H), (K, S) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != H:
        raise _error(f"k {k.shape} must be [{B}, K, S, {H}] to go with q {q.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise _error(f"v {v.shape} must agree with k {k.shape} in all but the last axis")
    if N % K:
        raise _error(f"k has {K} heads, which do not divide the {N} heads of q")
    dtype = jnp.dtype(q.dtype).name
    if dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise _error(f"q, k, v must share one dtype of {', '.join(FLOATS)}; got {q.dtype}, {k.dtype}, {v.dtype}")
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise _error(f"lengths must be integers [{B}]; got {lengths.dtype}{list(lengths.shape)}")
    return DecodeSpec(B, S, N, K, dtype, H**-0.5 if scale is None else float(scale))


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"decode_attention: {text}")
