"""Several runs on one page that stands alone: curves over each other, what differs, samples side by side."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.training.curves import controls, curves_style, figures
from llm_jax.training.page import Html, flat, folded, grid, key, page, section, shown, text
from llm_jax.training.runs import Run, in_order, labels, read_run

MOST_SAMPLES = 50
_ABSENT = "–"
_FACTS = ("job", "state", "tokens", "time", "goodput", "workdir")


def compare(paths: Sequence[str]) -> str:
    """The page of the runs in these workdirs, finished or not.

    Raises UserError for a path that is no run's workdir, or is given twice.
    """
    runs = [read_run(path) for path in paths]
    seen = Counter(str(run.workdir.path) for run in runs)
    for path, count in seen.items():
        if count > 1:
            raise UserError(f"{path} is given {count} times")
    names = labels(runs)
    curves = [run.curves() for run in runs]
    heads = ["", *(f"{key(i)}{text(name)}" for i, name in enumerate(names))]
    body = [
        grid(
            ["", "job", "state", "tokens", "time", "goodput", "workdir"], map(_overview, range(len(runs)), names, runs)
        ),
        section("Curves", controls(names, curves) + figures(names, curves) if any(curves) else ""),
        section("Final metrics", grid(heads, _metrics(runs, machine=False))),
        folded("time and memory", grid(heads, _metrics(runs, machine=True))),
        section("Configuration", _differences(heads, runs)),
        section("Samples", _samples(heads, runs)),
    ]
    title = names[0] if len(names) == 1 else " · ".join(names) if len(names) <= 4 else f"{len(names)} runs"
    return page(title, [], "".join(body), curves_style(len(runs)))


def _overview(index: int, name: str, run: Run) -> list[Any]:
    last = run.last
    seconds, goodput = last.get("perf/wall_time"), last.get("perf/goodput")
    return [
        Html(f"{key(index)}{text(name)}"),
        run.record.get("job"),
        run.state,
        f"{last['num_tokens']:,}" if "num_tokens" in last else _ABSENT,
        _ABSENT if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h",
        _ABSENT if goodput is None else f"{goodput:.0%}",
        str(run.workdir),
    ]


def _metrics(runs: Sequence[Run], machine: bool) -> list[list[Any]]:
    last = [run.last for run in runs]
    names = [name for name in in_order([name for values in last for name in values]) if name != "step"]
    chosen = [name for name in names if name.startswith("perf/") == machine]
    return [[name, *(values.get(name, _ABSENT) for values in last)] for name in chosen]


def _differences(heads: Sequence[str], runs: Sequence[Run]) -> str:
    """The fields that are not the same in all runs, and the others on a click."""
    fields = [dict(flat({part: run.record.get(part) or {} for part in ("config", "parents")})) for run in runs]
    names = list(dict.fromkeys(name for values in fields for name in values if name not in ("config", "parents")))
    rows: dict[bool, list[list[Any]]] = {True: [], False: []}
    for name in names:
        values = [values.get(name, _ABSENT) for values in fields]
        same = all(value == values[0] for value in values)
        rows[same].append(
            [name.removeprefix("config."), *(["none"] if same and values[0] is None else map(_set, values))]
        )
    different = grid(heads, rows[False])
    if not different and len(runs) > 1:
        different = '<p class="soft">no field differs</p>'
    if not rows[True]:
        return different
    count = len(rows[True])
    return different + folded(
        f"{count} fields{' that are the same' if len(runs) > 1 else ''}", grid([], (row[:2] for row in rows[True]))
    )


def _set(value: Any) -> str:
    return "none" if value is None else shown(value)


def _samples(heads: Sequence[str], runs: Sequence[Run]) -> str:
    """A row per prompt, in the order of the first run that has it; the n-th sample of a prompt beside the n-th."""
    rows: dict[tuple[str, int], list[Any]] = {}
    for i, run in enumerate(runs):
        count: Counter[str] = Counter()
        for sample in run.samples:
            prompt = shown(sample.get("prompt", ""))
            cells = rows.setdefault((prompt, count[prompt]), [_ABSENT] * len(runs))
            cells[i] = _sample(sample)
            count[prompt] += 1
    kept = list(rows.items())[:MOST_SAMPLES]
    more = f'<p class="soft">{len(rows) - len(kept)} more in samples.jsonl</p>' if len(rows) > len(kept) else ""
    return grid(["prompt", *heads[1:]], ([prompt, *cells] for (prompt, _), cells in kept), "samples") + more


def _sample(sample: Mapping[str, Any]) -> Html:
    """Every field but the prompt; texts first, under their names."""
    fields = {name: value for name, value in sample.items() if name != "prompt"}
    texts = [name for name, value in fields.items() if isinstance(value, str) and name != "finish_reason"]
    parts = [f"{f'<b>{text(name)}</b>' if len(texts) > 1 else ''}{text(fields[name])}" for name in texts]
    rest = " · ".join(f"{name} {json.dumps(value)}" for name, value in fields.items() if name not in texts)
    return Html("".join(parts) + (f"<b>{text(rest)}</b>" if rest else ""))
