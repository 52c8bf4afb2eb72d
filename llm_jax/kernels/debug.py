"""Debug mode: what only the values of a call tell to be wrong, such as an index out of range, is checked on the host.

On where LLM_JAX_DEBUG=1 is set, or within `checking()`. It costs a transfer of the checked arrays per call.
"""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

VARIABLE = "LLM_JAX_DEBUG"

_checking = contextvars.ContextVar("checking", default=False)


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Within, values are checked; code traced before is not traced again."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def check_values(check: Callable[..., None], *arrays: Any) -> None:
    """In debug mode, `check(*arrays)` with NumPy arrays; nothing otherwise.

    What `check` raises comes at once where the arrays are known, and under `jax.jit` when the program runs: then as
    `jax.errors.JaxRuntimeError` with the same text in it.
    """
    if not (_checking.get() or os.environ.get(VARIABLE) == "1"):
        return
    if any(isinstance(x, Tracer) for x in arrays):
        jax.debug.callback(lambda *values: check(*map(np.asarray, values)), *arrays)
    else:
        check(*map(np.asarray, arrays))
