"""Calls of ops on random data, as the tuner and the benchmarks time them.

Each op's `tuning.py` makes its own (see `llm_jax.kernels.tuning.Tuning`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Case:
    """One call of an op, and what it costs at the least."""

    arrays: tuple[Any, ...]
    call: Callable[..., Any]
    """`call(*arrays, implementation=NAME)`."""
    differentiable: tuple[int, ...] = ()
    """Which of the arrays get gradients; none where the op has no gradient."""
    flops: float = 0.0
    """Of the forward pass: two per multiplication and addition of its matrix products, of what is visible alone."""
    backward_flops: float = 0.0
    bytes: float = 0.0
    """Least traffic of the forward pass: each input read once and each output written once."""


def forward(case: Case, implementation: str | None) -> Callable[..., Any]:
    """The op as a function of `case.arrays`."""
    return lambda *arrays: case.call(*arrays, implementation=implementation)


def pull(case: Case, implementation: str | None) -> Callable[..., Any]:
    """A function of `case.arrays` that gives the op's results and its backward pass: a pytree to be called."""

    def run(*arrays: Any) -> Any:
        def of_differentiable(*some: Any) -> Any:
            every = list(arrays)
            for i, x in zip(case.differentiable, some, strict=True):
                every[i] = x
            return case.call(*every, implementation=implementation)

        return jax.vjp(of_differentiable, *(arrays[i] for i in case.differentiable))

    return run


def cotangents(case: Case, implementation: str | None, seed: int = 1) -> Any:
    """Random cotangents of the op's results."""
    shapes = jax.eval_shape(forward(case, implementation), *case.arrays)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)])


def normal(key: Any, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    """Random numbers, never zeros: the clock of a GPU depends on its data."""
    return scale * jax.random.normal(key, shape, dtype)


def size(*arrays: Any) -> float:
    """Bytes of arrays, or of their shapes."""
    return float(sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(arrays)))
