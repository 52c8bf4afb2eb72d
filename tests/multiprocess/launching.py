"""Starts several processes of one run on this machine, and waits for them."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

TINY = str(pathlib.Path(__file__).parents[1] / "training" / "tiny_job.py")


class Started:
    """The processes of a run, each with its own log."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        folder: pathlib.Path,
        devices: int,
        cwd: pathlib.Path | None,
        slurm: bool,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"log{i}.txt" for i in range(len(commands))]
        self.processes: list[subprocess.Popen] = []
        for i, command in enumerate(commands):
            place = {
                **(under_srun(i, len(commands)) if slurm else by_address(i, len(commands), port)),
                "TINY_DEVICES": str(devices),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            }
            with self.logs[i].open("w") as log:
                environment = os.environ | place
                started = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment, cwd=cwd)
                self.processes.append(started)

    def text(self, i: int) -> str:
        return self.logs[i].read_text()

    def last_line(self, i: int) -> str:
        return self.text(i).rstrip().splitlines()[-1]

    def wait_for(self, pattern: str, i: int = 0, seconds: float = 120) -> None:
        """Until a log has the pattern."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text(i)):
            assert all(p.poll() is None for p in self.processes), self.text(i)
            assert time.monotonic() < deadline, self.text(i)
            time.sleep(0.02)

    def ends(self, seconds: float = 120) -> list[int]:
        """Exit statuses."""
        deadline = time.monotonic() + seconds
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in self.processes]


@contextlib.contextmanager
def running(
    commands: Sequence[Sequence[str]],
    folder: pathlib.Path,
    devices: int = 1,
    cwd: pathlib.Path | None = None,
    slurm: bool = False,
) -> Iterator[Started]:
    started = Started(commands, folder, devices, cwd, slurm)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


def by_address(i: int, count: int, port: int) -> dict[str, str]:
    return {
        "LLM_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "LLM_JAX_PROCESSES": str(count),
        "LLM_JAX_PROCESS": str(i),
    }


def under_srun(i: int, count: int) -> dict[str, str]:
    """What srun sets and jax reads; jax makes the port from the number of the job."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
    }


def tiny(workdir: pathlib.Path, steps: int, every: int = 5, sleep: float = 0.0) -> list[str]:
    return [TINY, str(workdir), str(steps), str(every), str(sleep)]


def job(config: str, workdir: pathlib.Path, *overrides: str) -> list[str]:
    return ["-m", "llm_jax.main", f"--config={config}", f"--workdir={workdir}", *overrides]
