"""What a call of `ssd` asks for."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SsdSpec:
    """The static part of a call."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    states: int
    dtype: str
    chunk_size: int | None

    @property
    def per_group(self) -> int:
        """Heads that share B and C."""
        return self.heads // self.groups


def ssd_spec(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    skip: Any = None,
    *,
    segment_ids: Any = None,
    initial_state: Any = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
) -> SsdSpec:
    """Checks a call, arguments as for `ssd`; raises ArgumentError."""
    if len(x.shape) != 4 or x.shape[1] < 1:
        raise _error(f"x must be [B, T, H, P] with T at least 1; got {x.shape}")
    batch, length, heads, head_dim = x.shape
    if dt.shape != (batch, length, heads):
        raise _error(f"dt {dt.shape} must be {[batch, length, heads]}")
    if A.shape != (heads,) or (skip is not None and skip.shape != (heads,)):
        raise _error(f"A and skip must be [{heads}]; got {A.shape}, {None if skip is None else skip.shape}")
    if len(B.shape) != 4 or B.shape[:2] != (batch, length) or C.shape != B.shape:
        raise _error(f"B and C must be [{batch}, {length}, G, N]; got {B.shape}, {C.shape}")
    groups, states = B.shape[2:]
    if heads % groups:
        raise _error(f"B has {groups} groups, which do not divide the {heads} heads of x")
    dtype = jnp.dtype(x.dtype).name
    if dtype not in FLOATS or B.dtype != x.dtype or C.dtype != x.dtype:
        raise _error(f"x, B, C must share one dtype of {', '.join(FLOATS)}; got {x.dtype}, {B.dtype}, {C.dtype}")
    if segment_ids is not None and (
        segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    ):
        raise _error(f"segment_ids must be integers {[batch, length]}; got {segment_ids.dtype}{segment_ids.shape}")
    if initial_state is not None and initial_state.shape != (batch, heads, head_dim, states):
        raise _error(f"initial_state {initial_state.shape} must be {[batch, heads, head_dim, states]}")
    if chunk_size is not None and not 1 <= chunk_size <= 256:
        raise _error(f"chunk_size={chunk_size} must be between 1 and 256, or None")
    return SsdSpec(batch, length, heads, head_dim, groups, states, dtype, chunk_size)


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"ssd: {text}")
