"""Weights in packed number formats. One format now: "int8", symmetric, a scale per output channel."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels.choice import ArgumentError

FORMATS = ("int8",)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """A [..., K, M] weight as codes and scales: weight = codes · scales. A pytree; `format` is static."""

    codes: Int[Array, "*stack K M"]
    scales: Float[Array, "*stack 1 M"]
    format: str = field(default="int8", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim


def quantize(weight: Float[Array, "*stack K M"], format: str = "int8") -> QuantizedArray:
    """Rounds to nearest with scale max|column| / 127, so no weight is off by more than half a scale.

    Raises:
        ArgumentError: an unknown format, or a weight that has no matrix.
    """
    check_format(format)
    if weight.ndim < 2:
        raise ArgumentError(f"quantize: weight must be [..., K, M]; got {weight.shape}")
    weight = weight.astype(jnp.float32)
    top = jnp.max(jnp.abs(weight), axis=-2, keepdims=True)
    scales = jnp.where(top > 0, top / 127.0, 1.0)
    codes = jnp.clip(jnp.round(weight / scales), -127, 127).astype(jnp.int8)
    return QuantizedArray(codes, scales, format)


def dequantize(weight: QuantizedArray, dtype: Any = jnp.float32) -> Float[Array, "*stack K M"]:
    """The weight that the codes stand for."""
    check_format(weight.format)
    return (weight.codes.astype(jnp.float32) * weight.scales).astype(dtype)


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise ArgumentError(f"quantized weights: format={format!r} is none of {', '.join(FORMATS)}")
