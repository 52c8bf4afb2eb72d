"""metrics.jsonl: a line per logged step, equal bit for bit after any number of restarts (`perf/…` aside)."""

import json
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from etils import epath

from llm_jax.base import processes
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.growing import GrowingFile

LATEST = ("learning_rate", "grad_norm")
"""Metrics logged as they were at the logged step; the others are means over the steps since the line before."""
TOTALS = ("num_tokens",)
"""Counts logged as their sum since step 0."""


class Accumulator:
    """The steps since the last line. TRL's conventions: a mean over steps, the latest of a few, totals of counts.

    A metric that comes as (sum, weight) is the ratio of both over all steps, and left out where there was no weight.

    Args:
        saved: what `saved()` gave, to go on from exactly there.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        saved = saved or {"sums": {}, "latest": {}, "totals": {}, "ratios": {}}
        self._sums = {name: (float.fromhex(total), count) for name, (total, count) in saved["sums"].items()}
        self._latest = {name: float.fromhex(value) for name, value in saved["latest"].items()}
        self._totals: dict[str, int] = dict(saved["totals"])
        self._ratios = {name: (float.fromhex(a), float.fromhex(b)) for name, (a, b) in saved["ratios"].items()}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One step's metrics: scalars, or (sum, weight).

        float32 sums are kept in float64, so their order alone decides the bits.
        """
        for name, value in metrics.items():
            if np.ndim(value):
                total, weight = self._ratios.get(name, (0.0, 0.0))
                self._ratios[name] = (total + float(value[0]), weight + float(value[1]))
                continue
            value = float(value)
            if name in TOTALS:
                self._totals[name] = self._totals.get(name, 0) + round(value)
            elif name in LATEST:
                self._latest[name] = value
            else:
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The line's numbers; the next interval starts."""
        line: dict[str, float] = {name: total / count for name, (total, count) in self._sums.items()}
        line |= {name: total / weight for name, (total, weight) in self._ratios.items() if weight}
        line |= self._latest | self._totals
        self._sums, self._latest, self._ratios = {}, {}, {}
        return line

    def saved(self) -> dict[str, Any]:
        """The state as JSON, floats in hexadecimal: nothing is rounded."""
        return {
            "sums": {name: [total.hex(), count] for name, (total, count) in self._sums.items()},
            "latest": {name: value.hex() for name, value in self._latest.items()},
            "totals": dict(self._totals),
            "ratios": {name: [total.hex(), weight.hex()] for name, (total, weight) in self._ratios.items()},
        }


class MetricsFile:
    """Appends lines to metrics.jsonl (process 0 only) and cuts it back on resume. `lines` is how many it has.

    On an object store lines may be held back for half a minute: `flush` before a checkpoint that counts on them. Within
    `with MetricsFile(...) as metrics:` that happens at the end too.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path)
        self.lines = 0
        self._file: GrowingFile | None = None

    def append(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers keep nine significant digits, enough for any float32; others become null. Returns the line."""
        line = {"step": step} | {name: _nine_digits(value) for name, value in values.items()}
        if processes.first():
            if self._file is None:
                self._file = GrowingFile(self.path)
            self._file.append((json.dumps(line) + "\n").encode())
        self.lines += 1
        return line

    def flush(self) -> None:
        """Returns when all lines are stored."""
        if self._file is not None:
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()

    def cut(self, step: int, lines: int) -> None:
        """Keeps what was there when the checkpoint of `step` was saved: at most `lines` lines, none of a later step."""
        text = self.path.read_text() if self.path.exists() else ""
        kept = 0
        end = 0
        for line in text.splitlines(keepends=True):
            if kept == lines or not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept += 1
            end += len(line)
        if end < len(text) and processes.first():
            # A kill in the middle must not lose lines that no later step would write again.
            write_atomically(self.path, text[:end])
        self.lines = kept


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a kill tore is left out. Empty where there is no file."""
    path = epath.Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_values(path: epath.PathLike) -> dict[str, Any]:
    """The last value of every metric in a metrics.jsonl."""
    return {name: value for line in read_metrics(path) for name, value in line.items()}


def _nine_digits(value: Any) -> Any:
    if isinstance(value, int | str):
        return value
    return float(f"{float(value):.9g}") if math.isfinite(value) else None
