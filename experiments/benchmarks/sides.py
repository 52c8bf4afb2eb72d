"""Two sides of a comparison, each a process of its own that does one step when told to. Standard library only.

A worker reads JSON lines on stdin, `{"do": "step"}` or `{"do": "stop"}`, and answers `{"seconds", "cpu", "peak_mib",
"result"}`; its first line, once it is warm, says `{"ready": NAME}`. The two take strict turns, so that a busy machine
disturbs both alike, with a pause between them for thread pools that spin after their work.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

THREADS = min(2, len(os.sched_getaffinity(0)))
PAUSE = 0.25
"""Seconds between turns: OpenMP's threads keep spinning for 0.2."""
HERE = Path(__file__).parent

# transformers looks for a package `kernels`, and would take the benchmark of that name, which lies beside its workers.
sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]


def serve(name: str, step: Callable[[], Any], warmups: int = 2) -> None:
    """A worker's main loop. `step` does one whole step, waits for it, and returns its result: a loss, or tokens."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Whatever libraries print is no answer.
    for _ in range(warmups):
        step()
    print(json.dumps({"ready": name}), file=answers)
    for line in sys.stdin:
        if json.loads(line)["do"] == "stop":
            break
        start, busy = time.perf_counter(), time.process_time()
        result = step()
        took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - busy}
        print(json.dumps(took | {"peak_mib": peak_mib(), "result": result}), file=answers)


def peak_mib() -> float:
    """Peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


class Side:
    """A worker started for one side, and what it answered."""

    def __init__(self, label: str, python: str, script: str, options: dict[str, Any]):
        self.label, self.seconds, self.cpu, self.peak, self.results = label, [], [], 0.0, []
        environment = os.environ | {
            "OMP_NUM_THREADS": str(THREADS),
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        cores = sorted(os.sched_getaffinity(0))[:THREADS]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self._read()

    def step(self) -> None:
        self._write("step")
        answer = self._read()
        self.seconds.append(answer["seconds"])
        self.cpu.append(answer["cpu"])
        self.results.append(answer["result"])
        self.peak = answer["peak_mib"]

    def stop(self) -> None:
        self._write("stop")
        self.process.wait(timeout=30)

    def _write(self, what: str) -> None:
        assert self.process.stdin is not None
        print(json.dumps({"do": what}), file=self.process.stdin, flush=True)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(f"error: {self.label}: the worker ended\n{self.errors.read()[-2000:]}")
        return json.loads(line)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, by linear interpolation."""
    ordered = sorted(values)

    def at(share: float) -> float:
        low, rest = divmod(share * (len(ordered) - 1), 1)
        high = min(int(low) + 1, len(ordered) - 1)
        return ordered[int(low)] * (1 - rest) + ordered[high] * rest

    return at(0.25), at(0.5), at(0.75)


def alternate(sides: Sequence[Side], repeats: int) -> None:
    """`repeats` steps of each side, in turn."""
    for _ in range(repeats):
        for side in sides:
            time.sleep(PAUSE)
            side.step()


def header() -> None:
    print("| case | side | median s | quartiles | CPU s | tokens/s | peak MiB | loss | ours is faster by |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)


def compare(case: str, tokens: int, sides: Sequence[Side], repeats: int) -> None:
    """Runs a case and prints its rows. The first side is ours; `tokens` counts what a step trains on."""
    alternate(sides, repeats)
    ours = quartiles(sides[0].seconds)[1]
    for side in sides:
        low, median, high = quartiles(side.seconds)
        cpu = quartiles(side.cpu)[1]
        ratio = "" if side is sides[0] else f"{median / ours:.2f}x"
        print(
            f"| {case} | {side.label} | {median:.3f} | {low:.3f} to {high:.3f} | {cpu:.3f} "
            f"| {tokens / median:,.0f} | {side.peak:,.0f} | {side.results[0]:.4f} | {ratio} |",
            flush=True,
        )
        side.stop()


def no_peer() -> None:
    print("no --peer-python: only this side is measured, there is nothing to compare it with", flush=True)
