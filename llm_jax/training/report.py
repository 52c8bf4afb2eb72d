"""report.html: what a run did, on one page that needs no network, from the files in its workdir alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.workdir import Workdir
from llm_jax.training.alignment_page import by_kind, sides
from llm_jax.training.curves import controls, curves_style, figures
from llm_jax.training.page import flat, folded, grid, page, read_json, section, table, text
from llm_jax.training.runs import Run, open_run
from llm_jax.training.trees import STYLE, trees


def write_report(workdir: Workdir) -> None:
    """Writes `report.html` from metrics.jsonl, config.json, samples.jsonl, trees.jsonl, data/summary.json and the
    checkpoints.

    What is absent is left out, so it can be written again at any time, for a run that is done, interrupted or failed.
    Does nothing where there is no workdir yet. samples.jsonl: one object per line, whose keys become columns
    (`prompt`, `before`, `after`, …); trees.jsonl: see `trees.trees`; data/summary.json: any JSON object. Raises
    UserError for lines that are none.
    """
    if not workdir.path.exists():
        return
    run = open_run(workdir)
    last, curves, config = run.last, [run.curves()], flat(run.record)
    sections = [
        section("Results", table((name, value) for name, value in last.items() if name.startswith("eval_"))),
        section("Chosen and rejected", sides(run, curves[0])),
        section("Accuracy by kind", by_kind(last)),
        section("Curves", controls([run.name], curves) + figures([run.name], curves) if curves[0] else ""),
        section("Search trees", trees(run.trees)),
        section("Samples", _caption(run) + _samples(run.samples)),
        section("Throughput", table((name, value) for name, value in last.items() if name.startswith("perf/"))),
        section("Data", table(flat(read_json(workdir.data / "summary.json") or {}))),
        section("Checkpoints", _checkpoints(workdir.checkpoints)),
        section("Configuration", folded("every field", table(config))),
    ]
    facts = [f"{run.record.get('job', 'run')} · {run.state}", str(workdir.path)]
    write_atomically(workdir.report, page(run.name, facts, "".join(sections), curves_style(1) + STYLE))


def _caption(run: Run) -> str:
    """What stands beside the trained policy's answers."""
    config = run.record.get("config", {})
    if run.record.get("job") != "preference" or not any("before" in sample for sample in run.samples):
        return ""
    same = config.get("reference") is None
    who = "the policy it began with" + (", which is its reference" if same else ", not its reference")
    return f'<p class="soft">before: {who}; after: the trained one</p>'


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return grid(
        [text(column) for column in columns], ([row.get(column) for column in columns] for row in rows), "samples"
    )


def _checkpoints(directory: epath.Path) -> str:
    rows = []
    for path in sorted(directory.glob("step_*/commit.json")) if directory.exists() else []:
        commit = read_json(path)
        if isinstance(commit, dict) and "files" in commit:
            size = sum(entry[0] for entry in commit["files"].values())
            metric = "" if commit.get("metric") is None else f" · metric {commit['metric']:.6g}"
            rows.append((path.parent.name, f"{size / 1e6:.1f} MB · {len(commit['files'])} files{metric}"))
    return table(rows)
