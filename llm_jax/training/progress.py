"""How fast a run is and how long it still takes: numbers for `perf/…` and the line on the terminal."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from llm_jax.base import processes
from llm_jax.base.logging import log
from llm_jax.base.progress import StatusLine, clock, short
from llm_jax.training.goodput import RunClock
from llm_jax.training.peaks import peak_flops


@dataclass
class Pause:
    """How long a pause was, once it is over."""

    seconds: float = 0.0


class Meter:
    """Time and tokens of the steps since the last figures, without what `paused` covers and the first, which compiles.

    Args:
        flops_per_token: of a training step (forward and backward), by the convention of the model's family file.
        devices: those of the mesh.
        compute_dtype: decides which peak the achieved FLOP/s are a share of.
        clock: counts the time in steps, less the waits for data, as productive.
    """

    def __init__(
        self, flops_per_token: float | None, devices: list[Any], compute_dtype: str, clock: RunClock | None = None
    ) -> None:
        peak = peak_flops(devices[0], compute_dtype)
        self._tokens_per_s_at_peak = peak * len(devices) / flops_per_token if peak and flops_per_token else None
        # Of another process's devices nothing can be asked.
        self._device = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
        self._clock = clock or RunClock()
        self._first: float | None = None
        self._saving = 0.0
        self._restart()

    def _restart(self) -> None:
        self._since, self._steps, self._tokens, self._waited = time.perf_counter(), 0, 0.0, 0.0

    def step_done(self, tokens: float) -> None:
        if self._first is None:
            self._first = time.perf_counter() - self._since
            self._restart()
        else:
            self._steps += 1
            self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[Pause]:
        pause, start = Pause(), time.perf_counter()
        yield pause
        pause.seconds = time.perf_counter() - start
        self._since += pause.seconds

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What holds up the steps while a checkpoint is saved; the rest of the save goes on beside them."""
        with self.paused() as pause:
            yield
        self._saving += pause.seconds

    @contextlib.contextmanager
    def waiting(self, under_way: Iterable[Any]) -> Iterator[None]:
        """A wait for data, which costs nothing as long as the devices are still at work on what is `under_way`."""
        start = time.perf_counter()
        yield
        if all(leaf.is_ready() for leaf in jax.tree.leaves(list(under_way))):
            self._waited += time.perf_counter() - start

    def in_steps(self) -> float:
        """Productive seconds since the last figures."""
        return time.perf_counter() - self._since - self._waited if self._steps else 0.0

    def take(self) -> dict[str, float]:
        """`perf/…` numbers of the steps since the last call: seconds, tokens (padding left out), GB."""
        figures = {}
        if self._steps:
            seconds = time.perf_counter() - self._since
            figures["perf/step_time"] = seconds / self._steps
            figures["perf/data_wait"] = self._waited / self._steps
            if self._tokens:
                figures["perf/tokens_per_s"] = self._tokens / seconds
                if self._tokens_per_s_at_peak is not None:
                    figures["perf/mfu"] = self._tokens / seconds / self._tokens_per_s_at_peak
        elif self._first is not None:
            figures["perf/first_step_time"] = self._first
        if self._saving:
            figures["perf/save_time"] = self._saving
        self._clock.add(self.in_steps())
        figures |= self._clock.figures()
        figures["perf/peak_memory_gb"] = peak_memory(self._device) / 1e9
        self._saving = 0.0
        self._restart()
        return figures


def peak_memory(device: Any) -> int:
    """Most bytes in use on the device so far; on a CPU, which does not count them, of the process."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


class ProgressLine:
    """One line that is written over on a terminal; elsewhere one line per call."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps = name, steps
        self._line = StatusLine(sys.stderr.isatty() and processes.first())

    def show(self, step: int, line: Mapping[str, Any]) -> None:
        parts = [f"{self._name} {step}/{self._steps}"]
        if "loss" in line:
            parts.append(f"loss {line['loss']:.4f}")
        if "perf/tokens_per_s" in line:
            parts.append(f"{short(line['perf/tokens_per_s'])} tokens/s")
        if "perf/mfu" in line:
            parts.append(f"{line['perf/mfu']:.0%} of peak")
        parts.append(f"{line['perf/peak_memory_gb']:.1f} GB")
        if "perf/step_time" in line and step < self._steps:
            parts.append(f"{clock(line['perf/step_time'] * (self._steps - step))} left")
        self._line.show(" · ".join(parts))

    def note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A line of its own: an evaluation."""
        self.close()
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith("perf/"))
        log(f"{self._name} {step}/{self._steps}: {numbers}")

    def close(self) -> None:
        """Leaves the terminal at the start of a line."""
        self._line.close(keep=True)
