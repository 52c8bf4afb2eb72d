"""The sides of a row of `kernels.py`, each a call that can be timed: our implementations, peers in JAX, PyTorch."""

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
from kernel_peers import peers
from kernel_rows import Row
from sides import HERE

from llm_jax.kernels.cases import Case, Program, enough, first_line, program, seconds_of
from llm_jax.kernels.choice import ArgumentError, find
from llm_jax.kernels.platform import target_platform
from llm_jax.kernels.tuning import tuning_of

WORKERS = max(1, (os.cpu_count() or 1) // 2)
"""Programs that are compiled at a time."""


@dataclass(frozen=True)
class Side:
    """One way to run a row; `refusal` says why it can't."""

    name: str
    ours: bool
    seconds: Callable[[int], float] | None
    temporary: int | None = None
    refusal: str = ""
    failed: bool = False
    """Ours, which broke where it said that it can run."""


def case_of(row: Row, dtype: str) -> tuple[Case, dict[str, int]]:
    tuning = tuning_of(row.op)
    shape = {**tuning.SHAPE, **row.shape}
    case = tuning.make_case(shape, dtype)
    return case if row.gradients is None else replace(case, differentiable=row.gradients), shape


def flops_of(row: Row, case: Case) -> float:
    """That count for the row's pass, by the usual convention: nothing that is computed twice counts twice."""
    passes = {"forward": case.flops, "backward": case.backward_flops}
    return (row.flops or 1.0) * passes.get(row.measured, case.flops + case.backward_flops)


def sides(row: Row, dtype: str, torch: "Torch | None") -> tuple[Case, list[Side]]:
    """Our implementations that take this call (the reference only on a CPU), then the peers."""
    case, shape = case_of(row, dtype)
    platform = target_platform()
    others = {"gpu", "tpu", "reference"} - {platform} - ({"reference"} if platform == "cpu" else set())
    cases: list[tuple[str, bool, Case, str | None]] = [
        (f"llm_jax {name}", True, case, name) for name in find(row.op).implementations if name not in others
    ]
    cases += [(name, False, peer, None) for name, peer in peers(row.op, shape, case).items()]
    # Compiling is most of a run's time, and leaves the interpreter free; what runs on the device runs alone.
    with ThreadPoolExecutor(WORKERS) as pool:
        programs = [pool.submit(program, each, name, row.measured) for _, _, each, name in cases]
    made = [_side(name, ours, made) for (name, ours, _, _), made in zip(cases, programs, strict=True)]
    if torch is not None:
        made.append(torch.side(row, shape, dtype))
    return case, made


def _side(name: str, ours: bool, made: Future[Program]) -> Side:
    try:
        ready = made.result()
        jax.block_until_ready(ready.call())
        count = enough(ready.call)
    except Exception as error:  # out of memory, or whatever a kernel or a peer refuses
        failed = ours and not isinstance(error, ArgumentError) and "RESOURCE_EXHAUSTED" not in str(error)
        return Side(name, ours, None, refusal=first_line(error), failed=failed)
    return Side(name, ours, lambda calls: seconds_of(ready.call, calls or count), ready.temporary)


class Torch:
    """PyTorch in a process of its own."""

    def __init__(self, python: str):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [python, str(HERE / "kernel_torch.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def side(self, row: Row, shape: dict[str, int], dtype: str) -> Side:
        asked = {"op": row.op, "shape": shape, "measured": row.measured, "dtype": dtype, "gradients": row.gradients}
        answer = self._ask(asked)
        if "error" not in answer:
            answer = self._ask({"count": 1})
        if "error" in answer:
            return Side("PyTorch", False, None, refusal=answer["error"])
        count = max(1, round(0.003 / answer["seconds"]))
        return Side("PyTorch", False, lambda calls: self._ask({"count": calls or count})["seconds"])

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(what), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return {"error": "the PyTorch side ended"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the PyTorch side ended"}

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
