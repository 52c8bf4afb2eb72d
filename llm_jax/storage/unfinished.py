"""A mark in a folder that is being written: while it is there, nobody takes the folder for complete.

It outlives a process that was killed or found the disk full, and lets the same command begin again in the folder, which
it would otherwise refuse as not empty.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.storage.holder import is_dead, this_process

MARK = "unfinished.json"


def refuse_unfinished(folder: epath.PathLike) -> None:
    """Raises UserError for a folder with the mark."""
    if (epath.Path(folder) / MARK).exists():
        raise UserError(f"{folder} is half written ({MARK} is there): what wrote it was stopped, and has to run again")


def check_free(folder: epath.PathLike, ours: re.Pattern[str]) -> None:
    """Raises UserError unless `written` may write to a folder: absent, empty, or left unfinished with nothing in it but
    names that match `ours`, by a process that is gone."""
    folder = epath.Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file")
    names = sorted(child.name for child in folder.iterdir())
    if names and MARK not in names:
        raise UserError(f"{folder} is not empty")
    if MARK in names and not is_dead(holder := _holder(folder)):
        raise UserError(
            f"{folder} is being written by process {holder['pid']} on {holder['host']}; if that is gone, delete it"
        )
    for name in names:
        if name != MARK and not ours.fullmatch(name):
            raise UserError(f"{folder} is not empty: beside an unfinished conversion it holds {name}")


@contextlib.contextmanager
def written(folder: epath.PathLike, ours: re.Pattern[str]) -> Iterator[None]:
    """Marks a folder, made if absent, while it is being written; what an earlier try left in it goes first.

    Raises UserError as `check_free`. An exception leaves the mark where it is.
    """
    folder = epath.Path(folder)
    check_free(folder, ours)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps(this_process()))
    for child in list(folder.iterdir()):
        if child.name != MARK:
            child.rmtree() if child.is_dir() else child.unlink()
    try:
        yield
    except BaseException:
        # Emptied, which a full disk allows: nobody is at work here any more.
        with contextlib.suppress(OSError):
            (folder / MARK).write_text("")
        raise
    (folder / MARK).unlink()


def _holder(folder: epath.Path) -> dict[str, Any]:
    """Who wrote the mark. An empty one, or one that was cut short, is a dead process's."""
    try:
        holder = json.loads((folder / MARK).read_text())
    except ValueError:
        holder = None
    if isinstance(holder, dict) and {"host", "pid", "start"} <= holder.keys():
        return holder
    return this_process() | {"start": "gone"}
