"""SIGTERM and Ctrl-C: the running step is finished and saved; the second Ctrl-C stops at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from llm_jax.base.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Within `with StopSignal() as stop:` a signal only sets `stop.requested`, to its name.

    Once everything is saved, `interrupt_with(message)` makes a signal, also one that came before, raise `Interrupted`.
    Outside of the main thread, where Python takes no signal handlers, `requested` stays None.
    """

    requested: str | None = None

    def __init__(self) -> None:
        self._message: str | None = None
        self._before: dict[int, object] = {}

    def interrupt_with(self, message: str) -> None:
        self._message = message
        if self.requested:
            self._interrupt()

    def _interrupt(self) -> None:
        raise Interrupted(f"interrupted by {self.requested}; {self._message}")

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested is not None, signal.Signals(number).name
        if self._message is not None:
            self._interrupt()
        if again and number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            raise KeyboardInterrupt
        # Not through sys.stderr: the signal may have arrived in the middle of a write to it.
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}{self.requested}: saving after this step; Ctrl-C again stops at once\n".encode())
