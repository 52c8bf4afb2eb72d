"""What a grouped product asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
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
    tokens: int | None = None
    """What the rows are taken from; None: x has the rows themselves."""


def grouped_matmul_spec(x: Any, w: Any, group_sizes: Any, *, rows: Any = None) -> GroupedSpec:
    """Checks a call, arguments as for `grouped_matmul`; raises ArgumentError."""
    return grouped_spec("grouped_matmul", x, {"w": w}, group_sizes, rows)


def grouped_spec(op: str, x: Any, weights: Mapping[str, Any], group_sizes: Any, rows: Any) -> GroupedSpec:
    """Checks a call of the op; `weights` by the names of its arguments. Raises ArgumentError."""
    taken = "M" if rows is None else "T"
    shape = next(iter(weights.values())).shape
    for name, w in weights.items():
        if len(x.shape) != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[1]:
            raise ArgumentError(f"{op}: x {x.shape} must be [{taken}, K] and {name} {w.shape} [E, K, N]")
        if jnp.dtype(x.dtype).name not in FLOATS or w.dtype != x.dtype:
            floats = ", ".join(FLOATS)
            raise ArgumentError(f"{op}: x and {name} must share one dtype of {floats}; got {x.dtype}, {w.dtype}")
        if w.shape != shape:
            raise ArgumentError(f"{op}: {' and '.join(weights)} must have one shape; got {shape}, {w.shape}")
    groups, inputs, outputs = shape
    if groups == 0:
        raise ArgumentError(f"{op}: {' and '.join(weights)} {shape} must have at least one group")
    if group_sizes.shape != (groups,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        got = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        raise ArgumentError(f"{op}: group_sizes must be integers [{groups}]; got {got}")
    dtype = jnp.dtype(x.dtype).name
    if rows is None:
        return GroupedSpec(x.shape[0], groups, inputs, outputs, dtype)
    if len(rows.shape) != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ArgumentError(f"{op}: rows must be integers [M]; got {rows.dtype}{list(rows.shape)}")
    if x.shape[0] == 0 and rows.shape[0] > 0:
        raise ArgumentError(f"{op}: rows {rows.shape} can't be taken from x {x.shape}, which has none")
    return GroupedSpec(rows.shape[0], groups, inputs, outputs, dtype, tokens=x.shape[0])


def within_rows(spec: GroupedSpec, group_sizes: Int[Array, " E"]) -> Int[Array, " E"]:
    """int32: the same sizes, with what is below 0 or behind the last row left out."""
    ends = jnp.minimum(jnp.cumsum(_within(group_sizes, spec.rows)), spec.rows)
    # A sum that is past the last row, and then past what 32 bits hold, stays past the last row.
    return jnp.diff(lax.cummax(ends), prepend=0)


def within_tokens(rows: Int[Array, " M"], tokens: int) -> Int[Array, " M"]:
    """int32: the same rows, with the first or the last token for those that are not there."""
    return _within(rows, max(0, tokens - 1))


def _within(x: Int[Array, " n"], most: int) -> Int[Array, " n"]:
    """int32: clipped to [0, most], which a narrow dtype may not hold, as int32 may not hold what a wide one has."""
    narrow = jnp.iinfo(x.dtype).bits < 32
    return jnp.clip(x.astype(jnp.int32) if narrow else x, 0, most).astype(jnp.int32)


def check_rows(op: str, spec: GroupedSpec, rows: np.ndarray) -> None:
    """Raises ArgumentError for rows that are not there."""
    if rows.size and (rows.min() < 0 or rows.max() >= spec.tokens):
        raise ArgumentError(f"{op}: rows must be in [0, {spec.tokens}); got {rows.min()} to {rows.max()}")


def check_sizes(op: str, spec: GroupedSpec, group_sizes: np.ndarray) -> None:
    """Raises ArgumentError for groups that are not there."""
    if (group_sizes < 0).any() or group_sizes.sum() > spec.rows:
        got = group_sizes.tolist()
        raise ArgumentError(f"{op}: group_sizes must be at least 0 and add up to {spec.rows} at most; got {got}")
