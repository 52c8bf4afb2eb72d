"""The folder of a run: what lies where in it, whether it is done, and who is at work in it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax.base.door import NO_SPACE
from llm_jax.base.errors import UserError
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.claims import claimed
from llm_jax.storage.holder import is_dead, this_process
from llm_jax.storage.json_files import read_json
from llm_jax.storage.remote import is_remote, to_path

FORMAT = 1
"""Version of the layout of a workdir and of what its names mean."""


class Workdir:
    """The parts of a run's folder as paths; nothing is made before it is written."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = to_path(path)
        if not is_remote(self.path):
            self.path = to_path(os.path.abspath(self.path.expanduser()))
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.data = self.path / "data"
        self.export = self.path / "export"
        self.report = self.path / "report.html"
        self.samples = self.path / "samples.jsonl"
        self.trees = self.path / "trees.jsonl"
        self.done = self.path / "done.json"

    def __str__(self) -> str:
        """The path as a person in this directory would type it."""
        inside = Path(self.path).is_relative_to(Path.cwd())
        return str(Path(self.path).relative_to(Path.cwd())) if inside else str(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the workdir for this process, and makes the folder if there is none.

        Raises UserError if a living process holds it, or if it can't be written to. A dead holder's lock is taken
        over, also when its process id has been given to another process since; on an object store see `claims`.
        """
        with contextlib.ExitStack() as held:
            try:
                remote = is_remote(self.path)
                held.enter_context(claimed(self.path / "lock", str(self)) if remote else self._local_lock())
            except OSError as e:
                if e.errno in NO_SPACE:
                    raise
                raise UserError(f"workdir {self} can't be written to: {e.strerror or e}") from None
            yield

    @contextlib.contextmanager
    def _local_lock(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        me = this_process()
        with self._lock_file() as f:
            holder = _parse(f.read())
            if holder is not None and not is_dead(holder):
                message = f"workdir {self} is in use by process {holder['pid']} on {holder['host']}"
                if holder["host"] != me["host"]:
                    message += f"; if that process is gone, delete {self}/lock"
                raise UserError(message)
            _rewrite(f, json.dumps(me))
        try:
            yield
        finally:
            # Of a folder that can no longer be written to, the lock is a dead process's soon.
            with contextlib.suppress(OSError):
                # Emptied, not deleted: whoever waits for this very file would otherwise lock one that is gone.
                with self._lock_file() as f:
                    if _parse(f.read()) == me:
                        _rewrite(f, "")

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes `config.json`: format, name, job, hash, the resolved configuration, sources and parents."""
        write_atomically(self.config, json.dumps(config, indent=1) + "\n")

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote. Raises UserError if it can't be read or has a format not known here."""
        config = read_json(self.config)
        if config.get("format") != FORMAT:
            raise UserError(f"{self}/config.json has format {config.get('format')!r}; this version reads {FORMAT}")
        return config

    def mark_done(self, summary: dict[str, Any]) -> None:
        """Commits the run; written last of all its files."""
        write_atomically(self.done, json.dumps(summary, indent=1) + "\n")

    def is_done(self) -> bool:
        """Whether the run was finished."""
        return self.done_summary() is not None

    def done_summary(self) -> dict[str, Any] | None:
        """What `mark_done` wrote, or None. A half-written mark is none."""
        try:
            return json.loads(self.done.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[Any]:
        """The lock's file, held by flock for the moment it takes to read and change it."""
        with open(self.path / "lock", "a+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            yield f


def is_workdir(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a run's folder (a Hugging Face folder has a config.json too, of another kind)."""
    try:
        config = json.loads((to_path(path) / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"format", "job", "config"} <= config.keys()


def _rewrite(f: Any, text: str) -> None:
    f.truncate(0)
    f.write(text)
    f.flush()


def _parse(text: str) -> dict[str, Any] | None:
    """A lock's holder; None for an empty lock, or one whose writer died while writing."""
    try:
        holder = json.loads(text)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and {"host", "pid", "start"} <= holder.keys() else None
