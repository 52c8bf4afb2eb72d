"""A run in one process after another: what it has done so far is in a file.

A kernel that hangs or breaks the device takes its process with it; the next process reads here what is over, and what
the one before it was at.
"""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUNG = "hung, or broke its process"
BREAKS = "CUDA_ERROR"
"""In an error after which nothing else runs in the process."""
STDERR = 2


class Journal:
    """Lines of JSON, each written at once. Within `patience` seconds of the last one, or the process ends."""

    def __init__(self, path: Path, patience: float):
        self.path, self.patience, self._lock = path, patience, threading.Lock()
        self.entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._begun, self._over = _counts(self.entries)

    def write(self, **entry: Any) -> None:
        with self._lock:
            self.entries.append(entry)
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if self.patience:
                faulthandler.dump_traceback_later(self.patience, exit=True, file=STDERR)

    def recall(self, name: str, made: Any) -> Any:
        """What the first process of the run found, by calling `made`."""
        for entry in self.entries:
            if name in entry:
                return entry[name]
        self.write(**{name: made()})
        return self.entries[-1][name]

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All there is to do. An error that comes out of it ends the run, too: the next process would meet it again."""
        try:
            yield
        finally:
            self.write(end=True)
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def at(self, key: str) -> Iterator[None]:
        """What the process is at within. An error that breaks the device ends the process."""
        self.write(begin=key)
        try:
            yield
        except Exception as error:
            leave_if_broken(str(error))
            self.write(over=key)
            raise
        self.write(over=key)

    def began(self, key: str) -> int:
        """How many processes before this one began this and did not come to its end."""
        return max(0, self._begun[key] - self._over[key])

    def is_over(self, key: str) -> bool:
        return self._over[key] > 0

    @property
    def ended(self) -> bool:
        return any("end" in entry for entry in self.entries)

    @property
    def reached(self) -> int:
        """Grows with what is said for the first time, and with what a process began and left."""
        return len({json.dumps(entry) for entry in self.entries}) + (self._begun - self._over).total()


def leave_if_broken(text: str) -> None:
    """Ends the process where an error says that nothing else will run in it."""
    if BREAKS in text:
        print(text.splitlines()[0], file=sys.stderr, flush=True)
        os._exit(3)


def run_all(command: list[str], path: Path) -> int:
    """`command --journal=PATH`, in one process after another until the run has ended, or none gets further; its exit
    status."""
    seen, reached = 0, 0
    while True:
        status = subprocess.call([*command, f"--journal={path}"])
        journal = Journal(path, 0)
        if journal.ended or journal.reached <= reached:
            return status if journal.ended and status >= 0 else max(status, 1)
        begun, over = _counts(journal.entries[seen:])
        at = "".join(f"{key}: " for key in begun - over)
        print(f"{at}the process ended with status {status}; another one goes on", file=sys.stderr, flush=True)
        seen, reached = len(journal.entries), journal.reached


def _counts(entries: list[dict[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """How often each thing began, and how often it was over."""
    begun, over = (Counter(entry[word] for entry in entries if word in entry) for word in ("begin", "over"))
    return begun, over
