"""A product's static description."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.choice import ArgumentError
from llm_jax.kernels.matmul.quantized import FORMATS, QuantizedArray


@dataclass(frozen=True)
class MatmulSpec:
    """`format` is the weight's number format, or None for a plain array."""

    rows: int
    inner: int
    columns: int
    dtype: str
    format: str | None


def matmul_spec(x: Any, w: Any) -> MatmulSpec:
    """The spec of a call of `matmul`. Raises ArgumentError for shapes and dtypes that do not fit."""
    if len(w.shape) != 2 or not x.shape or x.shape[-1] != w.shape[0]:
        raise ArgumentError(f"matmul: w is {list(w.shape)}, x {list(x.shape)}; wanted [K, M] and [..., K]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ArgumentError(f"matmul: x has dtype {x.dtype}, wanted a floating one")
    format = w.format if isinstance(w, QuantizedArray) else None
    if format is None and w.dtype != x.dtype:
        raise ArgumentError(f"matmul: w has dtype {w.dtype}, x {x.dtype}; wanted the same for both")
    if format is not None and format not in FORMATS:
        raise ArgumentError(f"matmul: w has format {format!r} (known: {', '.join(FORMATS)})")
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return MatmulSpec(rows, w.shape[0], w.shape[1], str(x.dtype), format)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """float32 sums; of float32 numbers, full float32 products."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, w, precision=precision, preferred_element_type=jnp.float32)
