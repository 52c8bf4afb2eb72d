"""What a grouped product asks for."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class GroupedSpec:
    """The static part of a call."""

    rows: int
    groups: int
    inputs: int
    outputs: int
    dtype: str


def grouped_matmul_spec(x: Any, w: Any, group_sizes: Any) -> GroupedSpec:
    """Checks a call, arguments as for `grouped_matmul`; raises ArgumentError."""
    if len(x.shape) != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[1]:
        raise _error(f"x {x.shape} must be [M, K] and w {w.shape} [E, K, N]")
    dtype = jnp.dtype(x.dtype).name
    if dtype not in FLOATS or w.dtype != x.dtype:
        raise _error(f"x and w must share one dtype of {', '.join(FLOATS)}; got {x.dtype}, {w.dtype}")
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise _error(f"group_sizes must be integers [{w.shape[0]}]; got {group_sizes.dtype}{list(group_sizes.shape)}")
    groups, inputs, outputs = w.shape
    return GroupedSpec(x.shape[0], groups, inputs, outputs, dtype)


def within_rows(spec: GroupedSpec, group_sizes: Int[Array, " E"]) -> Int[Array, " E"]:
    """The same sizes, with what is below 0 or behind the last row left out."""
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0)), spec.rows)
    return jnp.diff(ends, prepend=0)


def check_sizes(spec: GroupedSpec, group_sizes: np.ndarray) -> None:
    """Raises ArgumentError for groups that are not there."""
    if (group_sizes < 0).any() or group_sizes.sum() > spec.rows:
        raise _error(f"group_sizes must be at least 0 and add up to {spec.rows} at most; got {group_sizes.tolist()}")


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"grouped_matmul: {text}")
