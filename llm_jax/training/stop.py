"""SIGTERM and Ctrl-C: the running step is finished and saved; the second Ctrl-C stops at once.

Of several processes one may be told alone. They then stop after the same step, which they agree on through the
coordinator: each says which step it has gone past, and the one after the furthest is the last. A process that was told
of nothing pays nothing: the thread that watches the others answers for it.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from llm_jax.base import processes
from llm_jax.base.errors import Interrupted
from llm_jax.base.logging import log

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP = "stop"
"""What the processes tell each other under; once in a run, since what is told ends it."""


class StopSignal:
    """Within `with StopSignal() as stop:` a signal, of any process, only sets `stop.requested`, to its name.

    Once everything is saved, `interrupt_with(message)` makes a signal, also one that came before, raise `Interrupted`.
    Outside of the main thread, where Python takes no signal handlers, `requested` stays None.
    """

    requested: str | None = None

    def __init__(self) -> None:
        self._message: str | None = None
        self._before: dict[int, object] = {}
        self._lock = threading.Lock()
        self._passed = 0
        self._last: int | None = None
        self._asked = False

    def due(self, step: int) -> bool:
        """Whether `step`, which is under way, is to be the last; asked once for every step, in order."""
        if not processes.several():
            return self.requested is not None
        with self._lock:
            if not self._asked:
                self._passed = step
                return False
        if self._last is None:
            # The threads that watch answer, so that nobody waits here for another's devices.
            self._last = 1 + max(map(int, processes.told(_STOP)))
        return step >= self._last

    def interrupt_with(self, message: str) -> None:
        self._message = message
        if self.requested:
            self._interrupt()

    def _interrupt(self) -> None:
        raise Interrupted(f"interrupted by {self.requested}; {self._message}")

    def __enter__(self) -> Self:
        if (watch := processes.watch()) is not None:
            watch.subscribe(_STOP, self._told)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if (watch := processes.watch()) is not None:
            watch.subscribe(_STOP, None)

    def _told(self, reason: str) -> None:
        """Some process was told to stop, perhaps this one: says how far this one has come."""
        with self._lock:
            self.requested, self._asked = reason, True
            passed = self._passed
        processes.tell(_STOP, str(passed))
        log(f"{reason}: all processes save after the same step")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, name = self.requested is not None, signal.Signals(number).name
        self.requested = self.requested or name
        if (watch := processes.watch()) is not None:
            watch.notice(_STOP, f"{name} to {processes.name(processes.index())}")
        if self._message is not None:
            self._interrupt()
        if again and number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            raise KeyboardInterrupt
        # Not through sys.stderr: the signal may have arrived in the middle of a write to it.
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}{name}: saving after this step; Ctrl-C again stops at once\n".encode())
