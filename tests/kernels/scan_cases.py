"""Calls of selective_scan and ssd for kernels that an interpreter runs: numbers against float64, documents, padding."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import kernels
from llm_jax.kernels import tiles
from tests.kernels import devices
from tests.kernels.numerics import assert_numbers
from tests.kernels.recurrences import NAMES, exact, make_scan, value_and_grads

BATCH = 2
FAST = {"xla_backend_optimization_level": 0}
"""An interpreted kernel is a large program that runs once or twice."""


class Case(NamedTuple):
    """A call; sizes as `make_scan` has them."""

    op: str
    dtype: str
    packed: bool
    initial: bool
    sizes: dict[str, Any]
    length: int = 20

    def __str__(self) -> str:
        return "-".join([self.op, self.dtype, "packed" if self.packed else "one", *map(str, self.sizes.values())])

    @property
    def segment_ids(self) -> np.ndarray | None:
        """Documents 1, 2, 3; padding, documents 4, 2, padding. If packed."""
        ids = [1] * 5 + [2] * 9 + [3] * 6, [0] * 2 + [4] * 4 + [2] * 12 + [0] * 2
        places = np.arange(self.length) * 20 // self.length
        return np.array(ids)[:, places] if self.packed else None


def product(sizes: dict[str, list[dict[str, Any]]], dtypes: list[str], length: int = 20) -> list[Case]:
    """Every op, size and dtype, packed or not, from an initial state or nothing."""
    options = itertools.product(dtypes, (False, True), (False, True))
    return [
        Case(op, dtype, packed, initial, size, length)
        for dtype, packed, initial in options
        for op, of_op in sizes.items()
        for size in of_op
    ]


def arguments(case: Case) -> tuple[Any, ...]:
    """Of `value_and_grads`; NaN in padding."""
    x, *steps, skip, state = make_scan(case.op, jnp.dtype(case.dtype), batch=BATCH, length=case.length, **case.sizes)
    x, dt, A, b, c = x, *steps
    if (segments := case.segment_ids) is not None:
        x, dt, b, c = (jnp.where(_over(y, segments == 0), jnp.nan, y) for y in (x, dt, b, c))
    return x, dt, A, b, c, skip, state if case.initial else jnp.zeros_like(state)


def program(case: Case, implementation: str, sizes: Any) -> Callable[..., tuple[Any, ...]]:
    """`value_and_grads`, compiled for the shapes of the case's arguments; `sizes`: tiles of the kernel."""
    run = functools.partial(value_and_grads, getattr(kernels, case.op), implementation=implementation)
    segments = None if case.segment_ids is None else jnp.asarray(case.segment_ids)
    context = tiles.trying(case.op, implementation, sizes) if sizes is not None else contextlib.nullcontext()
    with devices.interpreter(implementation), context:
        compiled = jax.jit(lambda *a: run(a, segment_ids=segments)).lower(*arguments(case)).compile(FAST)

    def call(*arrays: Any) -> tuple[Any, ...]:
        with devices.interpreter(implementation):
            return jax.tree.map(np.asarray, compiled(*arrays))

    return call


def check_numbers(case: Case, got: tuple[Any, ...]) -> None:
    """Output, final state and all gradients against float64 and the reference in the same dtype."""
    arrays = arguments(case)
    want = exact(case.op, arrays, case.segment_ids)
    segments = None if case.segment_ids is None else jnp.asarray(case.segment_ids)
    plain = value_and_grads(getattr(kernels, case.op), arrays, "reference", segment_ids=segments)
    assert_numbers(NAMES, got, plain, want.numbers, case.dtype, want.narrow)


def check_documents(case: Case, run: Callable[..., tuple[Any, ...]], got: tuple[Any, ...]) -> None:
    """All that document 2 of each row holds grows by 10^4: what is of other documents stays the same, bit for bit."""
    x, dt, A, b, c, *rest = arguments(case)
    assert case.segment_ids is not None
    other = case.segment_ids == 2
    x, b, c = (jnp.where(_over(y, other), 1e4 * y, y) for y in (x, b, c))
    wild = run(x, dt, A, b, c, *rest)
    for name, one, two in zip(NAMES, got, wild, strict=True):
        if name in ("y", "d_x", "d_dt", "d_B", "d_C"):
            np.testing.assert_array_equal(one[~other], two[~other], err_msg=name)
            assert not np.array_equal(one[other], two[other]), name
    np.testing.assert_array_equal(got[1][0], wild[1][0], err_msg="final state of row 0, which document 3 leaves")
    np.testing.assert_array_equal(got[8], wild[8], err_msg="initial states, which no document 2 sees")


def _over(x: Any, tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(*tokens.shape, *(1,) * (x.ndim - 2))
