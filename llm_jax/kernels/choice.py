"""Which implementation of an op runs: asked for by name, or the first in the op's order that supports the call."""

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.kernels.platform import target_platform


class ArgumentError(UserError, ValueError):
    """A call that an op can't run; the one-line message names the argument."""


class Implementation(Protocol):
    """A module `kernels/OP/NAME.py`: what every implementation has beside its functions."""

    def supports(self, spec: Any, platform: str) -> str | None:
        """None, or the reason why this implementation can't run `spec` on `platform` ("cpu", "gpu", "tpu")."""
        ...


@dataclass(frozen=True)
class Op:
    """An op as `explain` and `supports` see it."""

    name: str
    spec: Callable[..., Any]
    """Static description of a call, from its own arguments (arrays or ShapeDtypeStructs); raises ArgumentError."""
    implementations: Mapping[str, Any]
    """Name -> module (see `Implementation`)."""
    order: tuple[str, ...]
    """Names tried when none is asked for."""


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and why each of the others does not."""

    op: str
    implementation: str | None
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.reasons.items())
        return f"{self.op}: {self.implementation or 'no implementation'}" + (f" ({others})" if others else "")


def decide(op: Op, spec: Any, requested: str | None, platform: str) -> Choice:
    """The choice for one call, without raising."""
    refusals = {name: module.supports(spec, platform) for name, module in op.implementations.items()}
    reasons = {name: reason for name, reason in refusals.items() if reason is not None}
    candidates = op.order if requested is None else (requested,)
    chosen = next((name for name in candidates if name in refusals and name not in reasons), None)
    for name in refusals:
        if name != chosen and name not in reasons:
            reasons[name] = (
                f"{chosen} comes first" if requested is None else f"implementation={requested!r} was asked for"
            )
    return Choice(op.name, chosen, reasons)


def choose(op: Op, spec: Any, requested: str | None) -> str:
    """Name of the implementation to run. An explicit request never falls back; an automatic choice is logged once.

    Raises:
        ArgumentError: the requested implementation is unknown or can't run this call, or none can.
    """
    if requested is not None and requested not in op.implementations:
        known = ", ".join(op.implementations)
        raise ArgumentError(f"{op.name}: implementation={requested!r} is unknown (known: {known})")
    platform = target_platform()
    choice = decide(op, spec, requested, platform)
    if choice.implementation is None:
        reasons = "; ".join(f"{k}: {v}" for k, v in choice.reasons.items() if requested in (None, k))
        raise ArgumentError(f"{op.name}: no implementation for this call on {platform} ({reasons})")
    if requested is None:
        _announce(f"kernels: {op.name} uses {choice.implementation} on {platform}")
    return choice.implementation


_announced = contextvars.ContextVar("announced", default=True)


@contextlib.contextmanager
def unannounced() -> Iterator[None]:
    """Choices that are made within are not logged: those of programs that are looked at and do not run."""
    token = _announced.set(False)
    try:
        yield
    finally:
        _announced.reset(token)


def _announce(text: str) -> None:
    if _announced.get():
        _log_once(text)


@functools.cache
def _log_once(text: str) -> None:
    log(text)


def find(op: str | Callable[..., Any]) -> Op:
    """The op of this name, or of this public function."""
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    try:
        return importlib.import_module(f"llm_jax.kernels.{name}").OP
    except (ModuleNotFoundError, AttributeError):
        raise ArgumentError(f"kernels: no op named {name!r}") from None


def explain(
    op: str | Callable[..., Any],
    *args: Any,
    implementation: str | None = None,
    platform: str | None = None,
    **kwargs: Any,
) -> Choice:
    """What the call `op(*args, **kwargs)` would run on `platform` (default: this one), and why not another.

    `op` is a name or the public function; arrays may be `jax.ShapeDtypeStruct`s. `str()` of the result is one line.
    """
    found = find(op)
    return decide(found, found.spec(*args, **kwargs), implementation, platform or target_platform())


def supports(
    op: str | Callable[..., Any], *args: Any, implementation: str, platform: str | None = None, **kwargs: Any
) -> str | None:
    """None if `implementation` can run the call `op(*args, **kwargs)` on `platform`, else the reason why not."""
    found = find(op)
    if implementation not in found.implementations:
        raise ArgumentError(f"{found.name}: implementation={implementation!r} is unknown")
    return found.implementations[implementation].supports(found.spec(*args, **kwargs), platform or target_platform())
