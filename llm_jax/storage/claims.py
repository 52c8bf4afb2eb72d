"""A lock on an object store, of plain reads, writes and lists alone: a folder of claims, one object per claimant.

Whoever wants the lock writes a claim and lists the folder. Since every finished write is listed, of two claimants at
least the one who wrote later sees the other. Who sees no other holds the lock, and says so in its claim. Who sees a
holder goes. Of those who only claim, the one with the smaller name stays and looks again, the others step back until
one holds it.

A holder writes its claim anew every `BEAT` seconds, with a number that grows. A claim that has not changed for `STALE`
seconds under the eyes of another claimant is a dead one's and is removed: no clock of another machine is trusted. A
process of the same machine is looked up instead, at once. A holder that finds its claim gone (the machine was
suspended, the network was away) ends its process: another may be writing already.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.storage.holder import is_alive, is_dead, this_process

BEAT = 10.0
"""Seconds between a holder's signs of life."""
STALE = 60.0
"""Seconds without one after which a holder is taken for dead."""
LOOK = 1.0
"""Seconds between two looks at others' claims."""


@contextlib.contextmanager
def claimed(folder: epath.PathLike, name: str) -> Iterator[None]:
    """Holds the lock that is the folder `folder`, in which nothing else lies.

    Raises UserError, naming host and process, where another holds it or is about to. `name` is the workdir's.
    """
    claims = _Claims(epath.Path(folder), name)
    try:
        claims.acquire()
        beating = threading.Thread(target=claims.beat, name="lock", daemon=True)
        beating.start()
        try:
            yield
        finally:
            claims.ended.set()
            beating.join()
    finally:
        claims.withdraw()


@dataclass
class _Seen:
    """Another's claim as it was first seen, and when that was (monotonic)."""

    content: bytes
    since: float


class _Claims:
    def __init__(self, folder: epath.Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._id = uuid.uuid4().hex
        self._me: dict[str, Any] = this_process()
        self._beats = 0
        self._seen: dict[str, _Seen] = {}
        self.ended = threading.Event()

    @property
    def _path(self) -> epath.Path:
        return self._folder / f"{self._id}.json"

    def acquire(self) -> None:
        waiting = False
        while True:
            began = time.monotonic()
            self._write("claims")
            others = self._others()
            if not others:
                self._write("holds")
                if time.monotonic() - began < STALE / 2:
                    return
                continue  # So slow that others may have taken this claim for a dead one's.
            alive = [id for id, holder in others.items() if is_alive(holder) or self._seen[id].since < 0]
            for id, holder in others.items():
                said = f"workdir {self._name} is in use by process {holder['pid']} on {holder['host']}"
                if holder["state"] != "holds":
                    continue
                if id in alive:
                    raise UserError(said)
                if not waiting:
                    log(f"{said}: waiting up to {STALE:.0f} s for a sign of life")
                    waiting = True
            if any(id < self._id for id in alive):
                self.withdraw()  # until there is a holder, who can be named
            time.sleep(LOOK)

    def beat(self) -> None:
        """Runs in a thread until `ended`: signs of life."""
        last = time.monotonic()
        while not self.ended.wait(BEAT):
            try:
                began = time.monotonic()
                taken = not self._path.exists()
                if not taken:
                    self._write("holds")
                    last = time.monotonic()
                    # Stopped between looking and writing, it may have brought back a claim that was removed.
                    taken = last - began > STALE / 2 and "holds" in [o["state"] for o in self._others().values()]
                if taken:
                    _end(f"error: the lock of workdir {self._name} was taken over by another process")
            except Exception as error:  # of whatever library reaches the store
                if time.monotonic() - last > STALE:
                    _end(f"error: workdir {self._name} can't be reached any more: {error}")

    def withdraw(self) -> None:
        with contextlib.suppress(Exception):  # What ended the run matters more; a dead claim is found out.
            self._path.unlink(missing_ok=True)

    def _write(self, state: str) -> None:
        self._beats += 1
        self._path.write_text(json.dumps({**self._me, "state": state, "beats": self._beats}))

    def _others(self) -> dict[str, dict[str, Any]]:
        """Others' claims, without those of the dead, which are removed. A living one's `since` becomes -1."""
        living = {}
        for path in self._folder.iterdir():
            id = path.name.removesuffix(".json")
            if id == self._id:
                continue
            try:
                content = path.read_bytes()
                holder = json.loads(content)
            except FileNotFoundError:
                continue
            except ValueError:
                holder = None
            if not isinstance(holder, dict) or not {"pid", "host", "start", "state"} <= holder.keys():
                holder = {"pid": "?", "host": "?", "start": "?", "state": "holds"}
            seen = self._seen.setdefault(id, _Seen(content, time.monotonic()))
            if content != seen.content:
                seen.since = -1
            stale = seen.since >= 0 and time.monotonic() - seen.since > STALE
            if stale or is_dead(holder):
                path.unlink(missing_ok=True)
            else:
                living[id] = holder
        return living


def _end(message: str, stop: Callable[[int], Any] = os._exit) -> None:
    """Ends the process at once, from any thread: nothing more may be written."""
    print(message, file=sys.stderr, flush=True)
    stop(1)
