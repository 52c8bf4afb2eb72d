"""What a preference run's report shows beside its curves: both answers' numbers side by side, and accuracy by kind."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.training.curves import Curves, compared
from llm_jax.training.page import grid, text
from llm_jax.training.runs import Run

SIDES = ("chosen", "rejected")
# Metric of both sides, and what is said of it.
BOTH = {
    "rewards": "reward: β (log π − log π_ref)",
    "probs": "probability per token",
    "logps": "log-probability, nats",
    "lengths": "length, tokens",
}
TOLD = {
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "implicit_kl": "KL from the reference, nats an answer",
    "kl": "KL from the reference, nats an answer",
}
KINDS = {"rewards/accuracies": "chosen over rejected", "exact_match": "right answers"}


def sides(run: Run, curves: Curves) -> str:
    """A figure per metric with a line for each side, in training and, where it was evaluated, on held-out pairs; and a
    table of the last values. Nothing of a run without preferences."""
    charts = []
    for name, told in BOTH.items():
        lines = {
            f"{held_out}{side}": curves[f"{prefix}{name}/{side}"]
            for prefix, held_out in (("", ""), ("eval_", "held-out "))
            for side in SIDES
            if f"{prefix}{name}/{side}" in curves
        }
        if len(lines) > 1:
            charts.append(compared(told, lines))
    rows = [[told, *(run.last.get(f"{prefix}{name}") for prefix in ("", "eval_"))] for name, told in TOLD.items()]
    for name, told in BOTH.items():
        for side in SIDES:
            rows.append([f"{told}, {side}", *(run.last.get(f"{prefix}{name}/{side}") for prefix in ("", "eval_"))])
    known = [row for row in rows if any(value is not None for value in row[1:])]
    figures = f'<div class="curves">{"".join(charts)}</div>' if charts else ""
    return figures + grid(["", "training, last", "held out, last"], known) if known else ""


def by_kind(last: Mapping[str, Any]) -> str:
    """Accuracies of the parts of the data: by source of the pairs, by number of steps of the problems."""
    rows: list[Sequence[Any]] = []
    for name, told in KINDS.items():
        for prefix, where in (("eval_", "held out"), ("", "training")):
            whole = f"{prefix}{name}"
            parts = [(n.removeprefix(whole)[1:], value) for n, value in last.items() if n[: len(whole)] == whole]
            named = [(part.replace("_", " "), value) for part, value in parts if part]
            if named:
                rows += [[part, text(told), where, value] for part, value in named]
                rows.append(["all", text(told), where, last.get(whole)])
    return grid(["kind", "", "", "share"], rows)
