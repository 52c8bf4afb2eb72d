"""What a product asks for."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from llm_jax.kernels.choice import ArgumentError
from llm_jax.kernels.matmul.quantized import QuantizedArray, check_format


@dataclass(frozen=True)
class MatmulSpec:
    """The static part of a call; `format` is the weight's number format, None for an array."""

    shape: tuple[int, ...]
    columns: int
    dtype: str
    format: str | None


def matmul_spec(x: Any, w: Any) -> MatmulSpec:
    """Checks a call, arguments as for `matmul`; raises ArgumentError."""
    if len(w.shape) != 2 or x.shape[-1:] != w.shape[:1]:
        raise ArgumentError(f"matmul: w {w.shape} must be [K, M] to go with x {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ArgumentError(f"matmul: x must be of a floating dtype; got {x.dtype}")
    if isinstance(w, QuantizedArray):
        check_format(w.format)
        return MatmulSpec(x.shape, w.shape[1], jnp.dtype(x.dtype).name, w.format)
    if w.dtype != x.dtype:
        raise ArgumentError(f"matmul: w {w.dtype} must be of x's dtype {x.dtype}, or a QuantizedArray")
    return MatmulSpec(x.shape, w.shape[1], jnp.dtype(x.dtype).name, None)
