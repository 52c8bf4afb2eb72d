"""Sizes of tiles: a stated default of each kernel, and tables of what was measured to be better.

A table is JSON: rows of `op`, `implementation`, `device` (kind, as JAX names it), `dtype`, `shape` (the kernel's own
class of shapes) and `tiles` (fields of the kernel's dataclass of tile sizes). `python -m llm_jax.tune` writes rows.
Read are the tables of this package (`tables/OP.json`) and, before them, the file that LLM_JAX_TILES names.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.kernels.platform import target_device_kind

TABLES = Path(__file__).parent / "tables"
VARIABLE = "LLM_JAX_TILES"
KEYS = ("op", "implementation", "device", "dtype", "shape", "tiles")

_tried: contextvars.ContextVar[dict[tuple[str, str, str | None], Any]] = contextvars.ContextVar("tried")
_heard: contextvars.ContextVar[list["Asked"] | None] = contextvars.ContextVar("heard", default=None)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a kernel asked for: the row that would answer, and the default."""

    op: str
    implementation: str
    device: str
    dtype: str
    shape: str
    default: Any


def tiles[T](op: str, implementation: str, *, dtype: str, shape: str, default: T) -> T:
    """Tile sizes for a call on the target device: `default` (a frozen dataclass) with a table's row put over it.

    Raises:
        UserError: a table that can't be read, or a row that names a field which `default` does not have.
    """
    wanted = (op, implementation, target_device_kind(), dtype, shape)
    heard = _heard.get()
    if heard is not None:
        heard.append(Asked(*wanted, default))
    tried = _tried.get({})
    for key in ((op, implementation, shape), (op, implementation, None)):
        if key in tried:
            return tried[key]
    for path in _paths(op):
        row = _read(path, path.stat().st_mtime_ns).get(wanted)
        if row is not None:
            return _replaced(path, default, row)
    return default


@contextlib.contextmanager
def trying(op: str, implementation: str, sizes: Any, shape: str | None = None) -> Iterator[None]:
    """Within, the kernel takes these tile sizes whatever the tables say; for one class of shapes, or for all.

    Code traced before is not traced again.
    """
    token = _tried.set({**_tried.get({}), (op, implementation, shape): sizes})
    try:
        yield
    finally:
        _tried.reset(token)


@contextlib.contextmanager
def hearing() -> Iterator[list[Asked]]:
    """What kernels that are traced within ask for, in order."""
    heard: list[Asked] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def _paths(op: str) -> list[Path]:
    own = os.environ.get(VARIABLE)
    if own and not Path(own).is_file():
        raise UserError(f"{VARIABLE}={own} is not a file")
    shipped = TABLES / f"{op}.json"
    return ([Path(own)] if own else []) + ([shipped] if shipped.is_file() else [])


@functools.lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> dict[tuple[str, ...], dict[str, int]]:
    del changed  # part of the key: a table that was written again is read again
    try:
        rows = json.loads(path.read_text())
        return {tuple(str(row[key]) for key in KEYS[:-1]): dict(row["tiles"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"tile table {path}: not a list of rows with {', '.join(KEYS)} ({error!r})") from None


def _replaced[T](path: Path, default: T, row: dict[str, int]) -> T:
    try:
        return dataclasses.replace(default, **row)  # pyright: ignore[reportArgumentType]
    except TypeError:
        known = ", ".join(field.name for field in dataclasses.fields(default))  # pyright: ignore[reportArgumentType]
        raise UserError(f"tile table {path}: {row} has a field that is not one of {known}") from None
