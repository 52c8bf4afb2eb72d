"""What the TPU kernels of several ops share. Imports Pallas: for kernel modules only."""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

VMEM_BYTES = 56 * 2**20
"""What a kernel may use; the smallest VMEM (TPU7x) has 64 MiB."""


def params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """Compiler parameters of a kernel with these semantics of its grid."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


def even(size: int, tile: int) -> int:
    """The multiple of 128 lanes, of `tile` at most, that cuts `size` into the same number of more equal parts."""
    parts = -(-size // tile)
    return size if parts == 1 else -(-size // (128 * parts)) * 128


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Float[Array, "m n"]:
    """Product of two matrices, summed over one axis of each, in float32; float32 operands with precision HIGHEST."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    numbers = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def keep(x: Array, *, axis: int, start: Any, begin: Any, end: Any) -> Array:
    """A tile, which begins at index `start` of `axis`, with 0 where the index is not in [begin, end)."""
    index = start + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where((index >= begin) & (index < end), x, jnp.zeros_like(x))
