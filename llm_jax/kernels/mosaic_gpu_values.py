"""Values of wgmma in registers, in its layouts: products, constants, and vectors along one axis of a matrix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from llm_jax.kernels.platform import interpreted

plgpu: Any = mosaic_gpu
"""Any: its classes are abstract to a type checker."""
LOG2E = 1.4426950408889634


def product(a: Any, b: Any, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """a @ b in float32, in the layout of wgmma's results; `meanwhile` runs between its start and its end."""

    def body(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        meanwhile()
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(total: jax.Array, a: jax.Array, b: Any, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """total + a @ b, `a` in registers; `meanwhile` runs between its start and its end."""
    if interpreted():  # the interpreter has no accumulators that start from a value, and no operands in registers
        added = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # TMA may write there next
        meanwhile()
        return total + added

    def body(acc: Any) -> None:
        plgpu.wgmma(acc, a, b)
        meanwhile()

    return pl.run_state(body)(plgpu.ACC.init(total))


def again(index: Any) -> jax.Array:
    """The same number, of which the compiler does not know that. wgmma takes an address for every 16 columns of an
    operand; those of one that is the same at every step of a loop are kept in registers, or spilled, unless its index
    is made again at every step."""
    return lax.optimization_barrier(index)


def constant(shape: tuple[int, ...], value: float) -> jax.Array:
    """A constant in the layout of wgmma's results, or for a vector in that of one per row of them."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def indices(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Row or column numbers of wgmma's results."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def numbers(count: int, axis: int) -> jax.Array:
    """0, 1, ... along an axis of wgmma's results: a vector, whose numbers are computed once for all that it is spread
    over."""
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=plgpu.Layout.WGMMA.reduce(1 - axis))


def spread(vector: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """A vector along `axis` (0: a number per row), repeated along the other one."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def per_row(ref: Any) -> jax.Array:
    """A vector with a number for each row of wgmma's results."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def per_column(ref: Any) -> jax.Array:
    """A vector with a number for each column of wgmma's results."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
