"""The product of every projection: with an array, or with a weight in a packed number format."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels.choice import ArgumentError, Op, choose
from llm_jax.kernels.matmul import reference, xla
from llm_jax.kernels.matmul.quantized import QuantizedArray as QuantizedArray
from llm_jax.kernels.matmul.quantized import check_format
from llm_jax.kernels.matmul.quantized import dequantize as dequantize
from llm_jax.kernels.matmul.quantized import quantize as quantize


@dataclass(frozen=True)
class MatmulSpec:
    """The static part of a call."""

    shape: tuple[int, ...]
    outputs: int
    dtype: str
    format: str | None


def matmul_spec(x: Any, w: Any) -> MatmulSpec:
    """Checks a call, arguments as for `matmul`; raises ArgumentError."""
    format = w.format if isinstance(w, QuantizedArray) else None
    if len(w.shape) != 2 or x.shape[-1:] != w.shape[:1]:
        raise ArgumentError(f"matmul: w {w.shape} must be [K, M] to go with x {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ArgumentError(f"matmul: x must be of a floating dtype; got {x.dtype}")
    if format is not None:
        check_format(format)
    elif not jnp.issubdtype(w.dtype, jnp.floating):
        raise ArgumentError(f"matmul: w must be of a floating dtype or a QuantizedArray; got {w.dtype}")
    return MatmulSpec(x.shape, w.shape[1], jnp.dtype(x.dtype).name, format)


OP = Op("matmul", matmul_spec, {"xla": xla, "reference": reference}, order=("xla",))


def matmul(
    x: Float[Array, "*batch K"], w: Float[Array, "K M"] | QuantizedArray, *, implementation: str | None = None
) -> Float[Array, "*batch M"]:
    """x @ w in x's dtype with float32 sums; float32 x means precision HIGHEST.

    A weight array is cast to x's dtype. A `QuantizedArray` is frozen: gradients flow to x alone.

    Raises:
        ArgumentError: shapes, dtypes or a format that do not fit, or an unknown implementation.
    """
    name = choose(OP, matmul_spec(x, w), implementation)
    return OP.implementations[name].matmul(x, w)
