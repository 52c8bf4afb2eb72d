"""What a grouped product asks for."""

from collections.abc import Mapping
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
    return grouped_spec("grouped_matmul", x, {"w": w}, group_sizes)


def grouped_spec(op: str, x: Any, weights: Mapping[str, Any], group_sizes: Any) -> GroupedSpec:
    """Checks a call of the op; `weights` by the names of its arguments. Raises ArgumentError."""
    shape = next(iter(weights.values())).shape
    for name, w in weights.items():
        if len(x.shape) != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[1]:
            raise ArgumentError(f"{op}: x {x.shape} must be [M, K] and {name} {w.shape} [E, K, N]")
        if jnp.dtype(x.dtype).name not in FLOATS or w.dtype != x.dtype:
            floats = ", ".join(FLOATS)
            raise ArgumentError(f"{op}: x and {name} must share one dtype of {floats}; got {x.dtype}, {w.dtype}")
        if w.shape != shape:
            raise ArgumentError(f"{op}: {' and '.join(weights)} must have one shape; got {shape}, {w.shape}")
    groups, inputs, outputs = shape
    if group_sizes.shape != (groups,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        got = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        raise ArgumentError(f"{op}: group_sizes must be integers [{groups}]; got {got}")
    return GroupedSpec(x.shape[0], groups, inputs, outputs, jnp.dtype(x.dtype).name)


def within_rows(spec: GroupedSpec, group_sizes: Int[Array, " E"]) -> Int[Array, " E"]:
    """The same sizes, with what is below 0 or behind the last row left out."""
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0)), spec.rows)
    return jnp.diff(ends, prepend=0)


def check_sizes(op: str, spec: GroupedSpec, group_sizes: np.ndarray) -> None:
    """Raises ArgumentError for groups that are not there."""
    if (group_sizes < 0).any() or group_sizes.sum() > spec.rows:
        got = group_sizes.tolist()
        raise ArgumentError(f"{op}: group_sizes must be at least 0 and add up to {spec.rows} at most; got {got}")
