"""A run as its workdir tells it: configuration, lines of metrics.jsonl, samples; and its axes, step by step."""

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.storage.workdir import Workdir, is_workdir
from llm_jax.training.goodput import WALL
from llm_jax.training.metrics import read_metrics
from llm_jax.training.page import read_json

AXES = {"steps": None, "tokens": "num_tokens", "time": WALL, "flops": "total_flos"}
"""What curves can be drawn over, and the running total in the lines that says how far along it a step is."""
_FIRST = ("loss", "eval_loss", "eval_", "rewards/")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """What there is of a run, done or not."""

    workdir: Workdir
    record: Mapping[str, Any]
    """config.json."""
    lines: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    trees: Sequence[Mapping[str, Any]] = ()
    """Lines of trees.jsonl."""

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.workdir.path.name)

    @property
    def last(self) -> dict[str, Any]:
        """The last value of every metric."""
        return {name: value for line in self.lines for name, value in line.items()}

    @property
    def state(self) -> str:
        """Where it stands."""
        step, steps = self.last.get("step", 0), self.record.get("config", {}).get("train", {}).get("steps")
        text = f"step {step}{f' of {steps}' if steps else ''}"
        return text if not steps or step >= steps else f"{text} · not finished"

    def curves(self) -> dict[str, dict[str, Points]]:
        """By metric and axis, the points of it that are numbers."""
        totals = {axis: _Total(self.lines, name) for axis, name in AXES.items() if name is not None}
        found: dict[str, dict[str, Points]] = {}
        for line in self.lines:
            step = line["step"]
            places = {"steps": step} | {axis: total.at(step) for axis, total in totals.items()}
            for name, value in line.items():
                if name in ("step", "epoch", *AXES.values()) or not isinstance(value, int | float):
                    continue
                for axis, place in places.items():
                    if place is not None:
                        found.setdefault(name, {}).setdefault(axis, []).append((place, value))
        return found


def read_run(path: Any) -> Run:
    """Raises UserError where there is no run, or a file of it is not what a run writes."""
    workdir = Workdir(path)
    if not workdir.path.is_dir():
        raise UserError(f"{path} is not a folder")
    if not is_workdir(workdir.path):
        raise UserError(f"{path} is not the workdir of a run")
    return open_run(workdir)


def open_run(workdir: Workdir) -> Run:
    """What a workdir holds so far, be it nothing. Raises UserError as `read_run`, but for a config.json."""
    record = read_json(workdir.config)
    try:
        lines = read_metrics(workdir.metrics)
        if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
            raise ValueError("a line is no object with a step")
    except ValueError as error:
        raise UserError(f"{workdir}/metrics.jsonl: {error}") from None
    samples, trees = _objects(workdir.samples), _objects(workdir.trees)
    return Run(workdir, record if isinstance(record, dict) else {}, lines, samples, trees)


def _objects(file: epath.Path) -> list[dict[str, Any]]:
    """The lines of a file, an object each; none where there is no file."""
    try:
        text = file.read_text() if file.exists() else ""
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(line, dict) for line in found):
            raise ValueError("a line is no object")
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return found


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each, no two alike: its name, or its folder's, or as much of the path as it takes."""

    def tail(run: Run, parts: int) -> str:
        return run.name if parts == 0 else "/".join(run.workdir.path.parts[-parts:])

    deepest = max((len(run.workdir.path.parts) for run in runs), default=0)
    chosen = [0] * len(runs)
    for _ in range(deepest):
        names = [tail(run, parts) for run, parts in zip(runs, chosen, strict=True)]
        chosen = [parts + (names.count(name) > 1) for parts, name in zip(chosen, names, strict=True)]
    return [tail(run, parts) for run, parts in zip(runs, chosen, strict=True)]


def in_order(names: Sequence[str]) -> list[str]:
    """Metrics as they are read: losses and evaluations first, what belongs to the machine last."""

    def rank(name: str) -> tuple[int, str]:
        first = next((place for place, group in enumerate(_FIRST) if name.startswith(group)), len(_FIRST))
        return (len(_FIRST) + 1 if name.startswith("perf/") else first, name)

    return sorted(set(names), key=rank)


class _Total:
    """A running total by step, straight between the lines that have it; None before the first and where none has."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], name: str) -> None:
        known = {line["step"]: line[name] for line in lines if isinstance(line.get(name), int | float)}
        self._steps = sorted(known)
        self._values = [known[step] for step in self._steps]

    def at(self, step: int) -> float | None:
        if not self._steps or step < self._steps[0]:
            return None
        after = bisect.bisect_left(self._steps, step)
        if after == len(self._steps) or self._steps[after] == step:
            return self._values[min(after, len(self._steps) - 1)]
        (left, right), (low, high) = self._steps[after - 1 : after + 1], self._values[after - 1 : after + 1]
        return low + (high - low) * (step - left) / (right - left)
