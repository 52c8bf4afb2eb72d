"""From the command to its first training step on this CPU: cold, with warm caches, and `--help`.

    python experiments/benchmarks/startup.py [--repeats 3] [--config configs/pretrain.py]

Each run starts in a workdir of its own. Cold: no compiled program, tokenizer or packed data is at hand. Warm: those of
the run before.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sides import quartiles

OVERRIDES = (
    "train.steps=1",
    "train.optimizer.warmup_steps=0",
    "train.log_every=1",
    "train.checkpoint.export=false",
    "task_eval.problems=0",
)


def seconds(command: list[str], until: Path | None = None, environment: dict[str, str] | None = None) -> float:
    """Wall time of the command, or until the file `until` has a line."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | (environment or {}), text=True
    )
    first = None
    while process.poll() is None:
        if until is not None and first is None and until.exists() and until.read_text().count("\n"):
            first = time.perf_counter() - start
        time.sleep(0.005)
    took = time.perf_counter() - start
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"error: {' '.join(command)}: status {process.returncode}\n{process.stderr.read()[-2000:]}")
    return took if first is None else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", default=str(Path(__file__).parents[2] / "configs" / "pretrain.py"))
    options = parser.parse_args()
    run = [sys.executable, "-m", "llm_jax.main"]
    print("| | median s | quartiles |\n|---|---|---|")

    def row(name: str, times: list[float]) -> None:
        low, median, high = quartiles(times)
        print(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} |", flush=True)

    for module in ("main", "generate"):
        row(f"{module} --help", [seconds([sys.executable, "-m", f"llm_jax.{module}", "--help"]) for _ in range(9)])
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}

        def first_step(i: int) -> float:
            workdir = Path(folder) / f"run-{i}"
            overrides = (*OVERRIDES, f"data.cache_dir={folder}/data")
            flags = [f"--config={options.config}", f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)]
            return seconds(run + flags, workdir / "metrics.jsonl", cache)

        row("first step, cold", [first_step(0)])
        row("first step, warm", [first_step(i + 1) for i in range(options.repeats)])


if __name__ == "__main__":
    main()
