"""How far a long piece of work has come: one line written over on a terminal, sparse lines elsewhere."""

import sys
import time

from llm_jax.base.logging import log

TERMINAL_SECONDS, LINE_SECONDS = 0.2, 20.0
_START_ANEW = "\r\x1b[2K"


class StatusLine:
    """On a terminal one line that is written over; elsewhere a line of its own for each text."""

    def __init__(self, terminal: bool):
        self.terminal = terminal
        self._open = False

    def show(self, text: str) -> None:
        if not self.terminal:
            log(text)
            return
        sys.stderr.write(_START_ANEW + text)
        sys.stderr.flush()
        self._open = True

    def close(self, keep: bool) -> None:
        """Leaves the terminal at the start of an empty line: the next one, or with `keep` false this one, wiped."""
        if self._open:
            sys.stderr.write("\n" if keep else _START_ANEW)
            sys.stderr.flush()
            self._open = False


class Progress:
    """Counts and rates of one piece of work. Where there is no terminal, work of less than 20 s prints nothing.

    Args:
      name: what is being done.
      rate_of: the count whose rate is shown, per second.
    """

    def __init__(self, name: str, rate_of: str | None = None):
        self._name, self._rate_of = name, rate_of
        self._line = StatusLine(sys.stderr.isatty())
        self._began = self._shown = time.monotonic()
        self._first: float | None = None

    def update(self, total: float | None = None, done: float = 0.0, **counts: float) -> None:
        """Shows the counts, if the last time is long enough ago.

        Args:
          total: of the work, where it is known, in units of `done`; then the time left is shown too.
          done: how much of it.
          counts: by name.
        """
        now = time.monotonic()
        if self._first is None:
            # What an earlier process did took no time of this one.
            self._first, self._done_before = now, done
            self._rated_before = counts.get(self._rate_of or "", 0.0)
        if now - self._shown < (TERMINAL_SECONDS if self._line.terminal else LINE_SECONDS):
            return
        self._shown = now
        seconds = now - self._first
        parts = [f"{self._name}: " + ", ".join(f"{short(value)} {name}" for name, value in counts.items())]
        if self._rate_of in counts and seconds > 0:
            parts.append(f"{short((counts[self._rate_of] - self._rated_before) / seconds)} {self._rate_of}/s")
        if total and done > self._done_before:
            parts.append(f"{done / total:.0%}")
            parts.append(f"{clock(seconds * (total - done) / (done - self._done_before))} left")
        self._line.show(" · ".join(parts))

    def close(self) -> None:
        """Leaves the terminal at the start of an empty line."""
        self._line.close(keep=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def short(number: float) -> str:
    """1234567 as 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds as [h:]mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
