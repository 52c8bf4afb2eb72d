"""What a call of `selective_scan` asks for."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ScanSpec:
    """The static part of a call."""

    batch: int
    length: int
    channels: int
    states: int
    dtype: str
    chunk_size: int | None


def scan_spec(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    skip: Any = None,
    *,
    segment_ids: Any = None,
    initial_state: Any = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
) -> ScanSpec:
    """Checks a call, arguments as for `selective_scan`; raises ArgumentError."""
    if len(u.shape) != 3 or u.shape[1] < 1 or delta.shape != u.shape:
        raise _error(f"u and delta must be [B, T, D] with T at least 1; got {u.shape}, {delta.shape}")
    batch, length, channels = u.shape
    if len(A.shape) != 2 or A.shape[0] != channels:
        raise _error(f"A {A.shape} must be [{channels}, N]")
    states = A.shape[1]
    if B.shape != (batch, length, states) or C.shape != B.shape:
        raise _error(f"B and C must be {[batch, length, states]}; got {B.shape}, {C.shape}")
    if skip is not None and skip.shape != (channels,):
        raise _error(f"skip {skip.shape} must be [{channels}]")
    for name, array in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        if jnp.dtype(array.dtype).name not in FLOATS:
            raise _error(f"{name} must be one of {', '.join(FLOATS)}; got {array.dtype}")
    if segment_ids is not None and (
        segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    ):
        raise _error(f"segment_ids must be integers {[batch, length]}; got {segment_ids.dtype}{segment_ids.shape}")
    if initial_state is not None and initial_state.shape != (batch, channels, states):
        raise _error(f"initial_state {initial_state.shape} must be {[batch, channels, states]}")
    if chunk_size is not None and chunk_size < 1:
        raise _error(f"chunk_size={chunk_size} must be positive or None")
    return ScanSpec(batch, length, channels, states, jnp.dtype(u.dtype).name, chunk_size)


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"selective_scan: {text}")
