"""Every kernel beside its peers on the device at hand: numerics, time, memory, in one run.

    python experiments/benchmarks/kernels.py --device-check [--peer-python PYTHON_WITH_TORCH] [--out FOLDER]
    python experiments/benchmarks/kernels.py --size test          # the same rows, tiny, on any machine
    python experiments/benchmarks/kernels.py --ops flash_attention --repeats 21

`--device-check` first holds each kernel to the reference, then times everything, within `--seconds` (520; what did not
fit is listed). Each row is one call and one pass; its sides (our implementations, cuDNN through `jax.nn`, tokamax where
it is installed, PyTorch in a process of its own) take turns on random data. Written to FOLDER after each row:
`kernels.md`, the table, `kernels.json`, the figures, and `kernels.svg`. A process that hangs for `--patience` seconds
or breaks is followed by another, which goes on behind the row. Exit status 1: a kernel's numbers are off, or it failed.

Columns: median ms; TFLOP/s, of products that count by convention (causal at half, backward of attention 2.5 times the
forward); bytes that have to move at least over the time, as a share of what a copy reaches in this run; MiB that the
program takes beside inputs and outputs; the time of the fastest peer over ours.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")  # PyTorch's process needs some, too

import jax
import jax.numpy as jnp
import kernel_checks
import kernel_step
from bars import bars
from kernel_rows import Row, rows
from kernel_sides import WORKERS, Side, Torch, flops_of, sides

from llm_jax.base.journal import HUNG, Journal, leave_if_broken, run_all
from llm_jax.kernels.cases import first_line, seconds_of

HEADER = ("row", "pass", "side", "ms", "TFLOP/s", "of copy", "temporary MiB", "peer / ours", "goal on an H200")
CHECK_HEADER = ("check", "implementation", "result", "error", "limit", "")


def copy_bandwidth(size: str) -> float:
    """Bytes a second, read and written, of the fastest of some copies."""
    x = jax.random.normal(jax.random.key(0), (2**30 if size == "full" else 2**20,), jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    seconds = min(seconds_of(lambda: copy(x), 4) for _ in range(6))
    return 2 * x.size * x.dtype.itemsize / seconds


def measure(row: Row, made: list[Side], repeats: int) -> dict[str, float]:
    """Median seconds of each side that runs, all taking turns."""
    runs = {side.name: side.seconds for side in made if side.seconds is not None}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run(0))
    return {name: statistics.median(t) for name, t in times.items()}


def lines_of(row: Row, dtype: str, torch: Torch | None, repeats: int, bandwidth: float) -> list[dict[str, Any]]:
    """A row's figures, side by side."""
    case, made = sides(row, dtype, torch)
    seconds = measure(row, made, repeats)
    peer = min((s for name, s in seconds.items() if not name.startswith("llm_jax")), default=None)
    found = []
    for side in made:
        line: dict[str, Any] = {"row": row.title, "op": row.op, "measured": row.measured, "side": side.name}
        if side.name in seconds:
            took = seconds[side.name]
            moved = case.bytes if row.measured == "forward" else 0.0
            line |= {
                "ms": 1e3 * took,
                "tflops": flops_of(row, case) / took / 1e12 or None,
                "of_copy": moved / took / bandwidth or None,
                "temporary_mib": None if side.temporary is None else side.temporary / 2**20,
                "peer_over_ours": peer / took if side.ours and peer else None,
            }
        else:
            line |= {"refusal": side.refusal, "failed": side.failed}
        found.append(line | {"goal": row.goal if side.ours else ""})
    return found


def step_line(size: str, repeats: int, profile: str | None) -> dict[str, Any]:
    made = kernel_step.step(size, repeats, profile)
    rate = made.flops / made.seconds
    share = f"{rate / made.peak:.1%} of peak, " if made.peak else ""
    return {
        "row": f"training step, {made.parameters / 1e9:.3g}B dense ({share}{made.tokens / made.seconds:,.0f} tokens/s)",
        "op": "training step",
        "measured": "step",
        "side": "llm_jax",
        "ms": 1e3 * made.seconds,
        "tflops": rate / 1e12,
        "temporary_mib": made.bytes / 2**20,
        "goal": kernel_step.GOAL,
    }


def text_of(line: dict[str, Any]) -> str:
    def number(name: str, form: str) -> str:
        return "" if line.get(name) is None else format(line[name], form)

    took = number("ms", ".4g") or f"not run: {line.get('refusal', '')}"
    cells = [line["row"], line["measured"], line["side"], took, number("tflops", ".4g"), number("of_copy", ".0%")]
    return f"| {' | '.join([*cells, number('temporary_mib', '.4g'), number('peer_over_ours', '.2f'), line['goal']])} |"


class Report:
    """Prints lines as they come, and keeps the files up to date."""

    def __init__(self, folder: Path | None, journal: Journal):
        self.folder, self.journal = folder, journal
        self.text = [entry["say"] for entry in journal.entries if "say" in entry]
        self.lines = [entry["line"] for entry in journal.entries if "line" in entry]
        self.failed = any(entry.get("failed") for entry in journal.entries)

    def say(self, text: str, **more: Any) -> None:
        print(text, flush=True)
        self.text.append(text)
        self.failed |= bool(more.get("failed"))
        self.journal.write(say=text, **more)

    def head(self, names: tuple[str, ...]) -> None:
        """Once in a run."""
        text = f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|"
        if text not in self.text:
            self.say(text)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.say(text_of(line), line=line, failed=line.get("failed", False))
        self.write()

    def write(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "kernels.md").write_text("\n".join(self.text) + "\n")
        (self.folder / "kernels.json").write_text(json.dumps(self.lines, indent=1) + "\n")
        groups: dict[str, dict[str, float]] = {}
        for line in self.lines:
            if line.get("tflops"):
                groups.setdefault(f"{line['row'][:44]}, {line['measured']}", {})[line["side"]] = line["tflops"]
        caption = f"TFLOP/s on {jax.devices()[0].device_kind}"
        (self.folder / "kernels.svg").write_text(bars(groups, caption))


def check_all(report: Report, wanted: list[Row], dtype: str, in_time: Callable[[], bool]) -> None:
    """Several at a time. What a process was at when it hung is tried again alone."""
    report.head(CHECK_HEADER)
    journal = report.journal

    def key(row: Row) -> str:
        return f"check {row.title}"

    def checked(row: Row) -> list[tuple[str, ...]]:
        if journal.began(key(row)) > 1:
            return [(row.title, "", "", "", "", f"FAILED: {HUNG}")]
        if not in_time():
            return [(row.title, "", "", "", "", "out of time")]
        journal.write(begin=key(row))
        try:
            made = kernel_checks.check(row, dtype)
        except Exception as error:
            return [(row.title, "", "", "", "", f"FAILED: {first_line(error)}")]
        return [
            (c.title, c.implementation, c.result, f"{c.error:.2e}", f"{c.limit:.2e}", "ok" if c.passed else "OFF")
            for c in made
        ]

    left = [row for row in wanted if not journal.is_over(key(row))]
    again = [row for row in left if journal.began(key(row))]
    for workers, some in ((1, again), (WORKERS, [row for row in left if row not in again])):
        with ThreadPoolExecutor(workers) as pool:
            for row, found in zip(some, pool.map(checked, some), strict=True):
                if workers > 1:  # this one or another
                    leave_if_broken(found[0][-1])
                for cells in found:
                    report.say(f"| {' | '.join(cells)} |", failed=cells[-1].startswith(("FAILED", "OFF")))
                journal.write(over=key(row))
                report.write()
                leave_if_broken(found[0][-1])
    jax.clear_caches()


def time_row(report: Report, key: str, nobody: dict[str, Any], lines: Callable[[], list[dict[str, Any]]]) -> None:
    """Adds the lines of a row, or `nobody` with the reason why there are none."""
    if report.journal.is_over(key):
        return
    if report.journal.began(key):
        found = [nobody | {"refusal": HUNG, "failed": True}]
    else:
        report.journal.write(begin=key)
        try:
            found = lines()
        except Exception as error:
            found = [nobody | {"refusal": first_line(error), "failed": True}]
    for line in found:
        report.add(line)
    report.journal.write(over=key)
    leave_if_broken(" ".join(line.get("refusal", "") for line in found))
    jax.clear_caches()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-check", action="store_true", help="numerics, too")
    parser.add_argument("--size", choices=("full", "test"), default="full")
    parser.add_argument("--ops", default="", help="names with commas between; `step` is the training step")
    parser.add_argument("--dtype", default=None, help="default bfloat16, at size test float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--patience", type=float, default=120, help="seconds without news after which a process ends")
    parser.add_argument("--peer-python", help="a Python that has torch")
    parser.add_argument("--out", type=Path, help="folder for table, figures and plot")
    parser.add_argument("--profile", help="folder for a trace of one training step")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.journal is None:
        with tempfile.TemporaryDirectory() as folder:
            return run_all([sys.executable, *sys.argv], Path(folder) / "journal")
    dtype = options.dtype or ("bfloat16" if options.size == "full" else "float32")
    wanted = set(filter(None, options.ops.split(",")))
    report = Report(options.out, Journal(options.journal, options.patience))
    begin = report.journal.recall("start", time.time)

    def asked(row: Row) -> bool:
        return not wanted or row.op in wanted

    def left() -> float:
        return options.seconds - (time.time() - begin)

    bandwidth = report.journal.recall("bandwidth", lambda: copy_bandwidth(options.size))
    device = jax.devices()[0]
    if not report.text:
        report.say(f"{device.device_kind}, jax {jax.__version__}, {dtype}; a copy moves {bandwidth / 1e12:.3g} TB/s")
    if options.device_check:
        checks = list(filter(asked, kernel_checks.rows(options.size)))
        check_all(report, checks, dtype, lambda: left() > options.seconds / 2)
    torch = Torch(options.peer_python) if options.peer_python else None
    report.head(HEADER)
    for row in filter(asked, rows(options.size)):
        nobody = {"row": row.title, "op": row.op, "measured": row.measured, "side": "", "goal": row.goal}

        def lines(row: Row = row, nobody: dict[str, Any] = nobody) -> list[dict[str, Any]]:
            if left() <= 0:
                return [nobody | {"refusal": "out of time"}]
            return lines_of(row, dtype, torch, options.repeats, bandwidth)

        time_row(report, f"{row.title}, {row.measured}", nobody, lines)
    if torch is not None:
        torch.stop()
    if (not wanted or "step" in wanted) and left() > 0:
        nobody = {"row": "training step", "op": "training step", "measured": "step", "side": "", "goal": ""}
        time_row(report, "step", nobody, lambda: [step_line(options.size, options.repeats, options.profile)])
    report.say(f"\n{time.time() - begin:.0f} s")
    report.write()
    report.journal.write(end=True)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
