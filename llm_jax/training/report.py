"""report.html: what a run did, on one page that needs no network, from the files in its workdir alone."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.workdir import Workdir
from llm_jax.training.curves import curve
from llm_jax.training.metrics import read_metrics

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #6a7180; --line: #d8dce3; --paper: #fff; --box: #f5f6f8;
  --curve: #2463c9; --good: #1d7f45; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --soft: #9aa2b1; --line: #3a404b; --paper: #16181d;
  --box: #1f2229; --curve: #79a8f5; --good: #6fcf97; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
.soft, figcaption { color: var(--soft); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--box); border-radius: 8px; padding: .7rem; }
figcaption { display: flex; justify-content: space-between; font-size: .85rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); } .curve { stroke: var(--curve); fill: none; stroke-width: 1.8; }
.point { fill: var(--curve); } .value { color: var(--ink); font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); padding: .35rem .6rem .35rem 0; }
th { color: var(--soft); font-weight: 600; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.samples td { white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace; min-width: 12rem; }
.wide { overflow-x: auto; } details > summary { cursor: pointer; color: var(--soft); }
"""


def write_report(workdir: Workdir) -> None:
    """Writes `report.html` from metrics.jsonl, config.json, samples.jsonl, data/summary.json and the checkpoints.

    What is absent is left out, so it can be written again at any time, for a run that is done, interrupted or failed.
    Does nothing where there is no workdir yet. samples.jsonl: one object per line, whose keys become columns
    (`prompt`, `before`, `after`, …); data/summary.json: any JSON object.
    """
    if not workdir.path.exists():
        return
    lines = read_metrics(workdir.metrics)
    config = _json(workdir.config) or {}
    title = config.get("name") or workdir.path.name
    last = {name: value for line in lines for name, value in line.items()}
    step, steps = last.get("step", 0), config.get("config", {}).get("train", {}).get("steps")
    facts = f"{config.get('job', 'run')} · step {step}{f' of {steps}' if steps else ''}"
    facts += " · stopped before its end" if steps and step < steps else ""
    sections = [
        _section("Results", _table((name, value) for name, value in last.items() if name.startswith("eval_"))),
        _section("Curves", _curves(lines)),
        _section("Samples", _samples(workdir.samples)),
        _section("Throughput", _table((name, value) for name, value in last.items() if name.startswith("perf/"))),
        _section("Data", _table(_flat(_json(workdir.data / "summary.json") or {}))),
        _section("Checkpoints", _checkpoints(workdir.checkpoints)),
        _section("Configuration", _configuration(config)),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>{_text(title)}</h1><p class="soft">{_text(facts)}<br>{_text(workdir.path)}</p>'
        f"{''.join(sections)}</body></html>\n"
    )
    write_atomically(workdir.report, page)


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """One figure per metric that has numbers; those of evaluations and losses first, machine's last."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                points.setdefault(name, []).append((line["step"], value))

    def rank(name: str) -> tuple[int, str]:
        groups = ("loss", "eval_loss", "eval_", "rewards/")
        first = next((place for place, group in enumerate(groups) if name.startswith(group)), len(groups))
        return (len(groups) + 1 if name.startswith("perf/") else first, name)

    figures = "".join(curve(name, points[name]) for name in sorted(points, key=rank))
    return f'<div class="curves">{figures}</div>' if figures else ""


def _samples(path: epath.Path) -> str:
    if not path.exists():
        return ""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(_shown(row.get(column)))}</td>' for column in columns)}</tr>" for row in rows
    )
    return f'<div class="wide"><table class="samples"><tr>{head}</tr>{body}</table></div>' if rows else ""


def _checkpoints(directory: epath.Path) -> str:
    rows = []
    for path in sorted(directory.glob("step_*/commit.json")) if directory.exists() else []:
        commit = _json(path)
        if isinstance(commit, dict) and "files" in commit:
            size = sum(entry[0] for entry in commit["files"].values())
            metric = "" if commit.get("metric") is None else f" · metric {commit['metric']:.6g}"
            rows.append((path.parent.name, f"{size / 1e6:.1f} MB · {len(commit['files'])} files{metric}"))
    return _table(rows)


def _configuration(config: Any) -> str:
    rows = _table(_flat(config))
    return f"<details><summary>every field</summary>{rows}</details>" if rows else ""


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(f"<tr><th>{_text(name)}</th><td>{_text(_shown(value))}</td></tr>" for name, value in rows)
    return f"<table>{body}</table>" if body else ""


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(prefix, value)] if prefix else []
    return [row for key, child in value.items() for row in _flat(child, f"{prefix}.{key}" if prefix else str(key))]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
