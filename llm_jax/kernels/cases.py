"""Calls of ops on random data, as the tuner and the benchmarks time them.

Each op's `tuning.py` makes its own (see `llm_jax.kernels.tuning.Tuning`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

LEAST_SECONDS = 0.003
"""A measurement takes at least that long, by as many calls as that needs."""


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


@dataclass(frozen=True)
class Program:
    """A compiled pass on a case's arrays."""

    call: Callable[[], Any]
    temporary: int
    """Bytes that it takes beside its inputs and outputs."""


def program(case: Case, implementation: str | None, measured: str) -> Program:
    """`measured`: "forward", "backward" (what the forward pass saved is its input), or "forward and backward"."""
    arrays = case.arrays
    if measured == "forward":
        return _program(forward(case, implementation), *arrays)
    out_gradients = cotangents(case, implementation)
    if measured == "backward":
        _, saved = jax.jit(pull(case, implementation))(*arrays)
        return _program(lambda saved, out_gradients: saved(out_gradients), saved, out_gradients)

    def both(arrays: Any, out_gradients: Any) -> Any:
        out, pulled = pull(case, implementation)(*arrays)
        return out, pulled(out_gradients)

    return _program(both, arrays, out_gradients)


def _program(f: Callable[..., Any], *inputs: Any) -> Program:
    run = jax.jit(f).lower(*inputs).compile()
    memory = run.memory_analysis()
    return Program(lambda: run(*inputs), 0 if memory is None else memory.temp_size_in_bytes)


def seconds_of(call: Callable[[], Any], count: int) -> float:
    """Seconds of one call, of `count` that are given to the device at once."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def enough(call: Callable[[], Any]) -> int:
    """How many calls make a measurement."""
    return max(1, round(LEAST_SECONDS / seconds_of(call, 1)))


def first_line(error: Exception) -> str:
    """What an error says, or its kind where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0][:160]


def normal(key: Any, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    """Random numbers, never zeros: the clock of a GPU depends on its data."""
    return scale * jax.random.normal(key, shape, dtype)


def size(*arrays: Any) -> float:
    """Bytes of arrays, or of their shapes."""
    return float(sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(arrays)))
