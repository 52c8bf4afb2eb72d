"""Who lives: every process gives a sign of life each second, and all end together when one has died or failed.

Signs are keys of the coordinator's store. Process 0 judges: who was silent for TIMEOUT seconds has died, who says that
it ends with an error is the cause. The verdict is a key too, and every process ends on it with one line and the
cause's exit status. Of process 0 itself the others judge. jax's own way is an abort from C++ and a page of text.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm_jax.base.errors import Interrupted

INTERVAL = 1.0
TIMEOUT = 40.0
"""Seconds of silence after which a process counts as dead."""
GRACE = 5.0
"""Seconds of silence that suffice once another process has seen a collective fail, as it does when a peer dies."""
DIED, SILENT = "died", "died or hangs"
LEAVING = {Interrupted.status: 15.0}
"""Seconds in which a process may come to its own end (a save) after a verdict of this status; else one second."""


@dataclass
class Sign:
    """What a process last said, and when it was heard."""

    text: str | None
    heard: float

    def hear(self, text: str | None, now: float) -> None:
        if text is not None and text != self.text:
            self.text, self.heard = text, now

    @property
    def ended(self) -> dict[str, Any] | None:
        return None if self.text is None else json.loads(self.text)["ended"]


class Watch(threading.Thread):
    """The thread of one process; `client` is jax's, of the coordination service. `names` are for messages."""

    def __init__(self, client: Any, index: int, count: int):
        super().__init__(name="watch", daemon=True)
        self._client, self._index = client, index
        self.names = [f"process {p}" for p in range(count)]
        self._over = threading.Event()
        self._beat = 0
        self._ended: dict[str, Any] | None = None
        self._signs = [Sign(None, time.monotonic()) for _ in range(count)]
        self._suspected: float | None = None
        self._unheard: float | None = None
        self._notices: dict[str, str] = {}
        self._subscribers: dict[str, Callable[[str], None]] = {}
        self._lock = threading.RLock()
        self._wanted: dict[str, str] = {}
        self._end_by: float | None = None
        self.verdict: dict[str, Any] | None = None
        self.guilty = threading.Event()
        """Set when the verdict is on this process itself."""
        self.epilogue: Callable[[], str] = lambda: ""
        """What the line on a dead process ends with: the last good checkpoint."""
        self.before_exit: list[Callable[[], None]] = []

    def stop(self) -> None:
        self._over.set()
        self.join()

    def notice(self, name: str, text: str) -> None:
        """Has the thread tell every process, this one too; the first text of a name holds. Safe in signal handlers."""
        self._wanted.setdefault(name, text)

    def subscribe(self, name: str, listener: Callable[[str], None] | None) -> None:
        """Calls `listener(text)` once for a notice of any process: from this thread, or now if it has come before."""
        with self._lock:
            if listener is None:
                self._subscribers.pop(name, None)
            elif name in self._notices:
                listener(self._notices[name])
            else:
                self._subscribers[name] = listener

    def end(self, status: int, message: str, suspect: bool) -> None:
        """Says that this process ends; `suspect`: perhaps only because another has died."""
        self._ended = {"status": status, "message": message, "suspect": suspect}
        self._say()

    def run(self) -> None:
        from jax.errors import JaxRuntimeError

        while not self._over.wait(INTERVAL):
            now = time.monotonic()
            try:
                self._say()
                self._tell()
                self._listen(now)
                self._unheard = None
            except JaxRuntimeError:
                self._unheard = self._unheard or now
                if now - self._unheard > TIMEOUT and self.verdict is None:
                    self.verdict = {"process": 0, "status": 1, "message": SILENT}
            if self.verdict is not None:
                self._obey(now)

    def _say(self) -> None:
        self._beat += 1
        text = json.dumps({"beat": self._beat, "ended": self._ended})
        self._client.key_value_set(f"alive/{self._index}", text, allow_overwrite=True)
        self._signs[self._index].hear(text, time.monotonic())

    def _tell(self) -> None:
        for name, text in list(self._wanted.items()):
            self._publish(f"notice/{name}", text)
            del self._wanted[name]

    def _try_get(self, key: str) -> str | None:
        from jax.errors import JaxRuntimeError

        try:
            return self._client.key_value_try_get(key)
        except JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def _publish(self, key: str, text: str) -> None:
        from jax.errors import JaxRuntimeError

        try:
            self._client.key_value_set(key, text)
        except JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def _listen(self, now: float) -> None:
        for key, text in self._client.key_value_dir_get("notice/"):
            name = key.removeprefix("notice/")
            if name == "verdict":
                self.verdict = self.verdict or json.loads(text)
                continue
            with self._lock:
                if name not in self._notices:
                    self._notices[name] = text
                    self._subscribers.pop(name, lambda text: None)(text)
        if self._index == 0:
            for key, text in self._client.key_value_dir_get("alive/"):
                self._signs[int(key.removeprefix("alive/"))].hear(text, now)
            watched = range(len(self._signs))
        else:
            self._signs[0].hear(self._try_get("alive/0"), now)
            watched = [0]
        if self.verdict is None and (found := self._find(now, watched)) is not None:
            self.verdict = found
            self._publish("notice/verdict", json.dumps(found))

    def _find(self, now: float, watched: Any) -> dict[str, Any] | None:
        """The process to blame, once that is clear."""
        ended = [(p, sign.ended) for p in {*watched, self._index} if (sign := self._signs[p]).ended]
        suspects = [(p, end) for p, end in ended if end and end["suspect"]]
        if suspects:
            self._suspected = self._suspected or now
        for p in watched:
            silence = now - self._signs[p].heard
            since = None if self._suspected is None else now - self._suspected
            if since is not None and since > GRACE and silence > GRACE:
                return {"process": p, "status": 1, "message": DIED}
            if silence > TIMEOUT:
                return {"process": p, "status": 1, "message": SILENT}
        for p, end in ended:
            if end and p in watched and not end["suspect"]:
                return {"process": p, "status": end["status"], "message": end["message"]}
        # Nobody has died, so what failed is what it says.
        if self._suspected is not None and now - self._suspected > 2 * GRACE:
            p, end = suspects[0]
            if end and p in watched:
                return {"process": p, "status": end["status"], "message": end["message"]}
        return None

    def _obey(self, now: float) -> None:
        assert self.verdict is not None
        cause, status, message = (self.verdict[key] for key in ("process", "status", "message"))
        if cause == self._index:
            self.guilty.set()
        # Whoever says that it ends, and knows why, is on its way.
        if self._ended is not None and (not self._ended["suspect"] or cause == self._index):
            return
        dead = message in (DIED, SILENT)
        self._end_by = self._end_by or now + (0.0 if dead else LEAVING.get(status, INTERVAL))
        if now < self._end_by:
            return
        for release in self.before_exit:
            release()
        line = f"{self.names[cause]} " + (f"{message}{self.epilogue()}" if dead else f"ended: {message}")
        sys.stdout.flush()
        os.write(2, f"{'\n' if os.isatty(2) else ''}error: {' '.join(line.split())}\n".encode())
        os._exit(status)
