"""kill -9 at random moments of a real run: it ends as the uninterrupted one, bit for bit.

    make test-slow

The moments are spread over starting, compiling, stepping, saving and evaluating. At least 20 kills have to hit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from tests.jobs.conftest import CONFIGS

STEPS, KILLS = 2000, 20
OVERRIDES = {
    "train.steps": STEPS,
    "train.checkpoint.every": 3,
    "train.eval_every": 60,
    "train.log_every": 4,
    "task_eval.problems": 0,
    "mesh.data": 2,
}


def command(workdir: Path) -> list[str]:
    flags = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    config = f"--config={CONFIGS / 'pretrain.py'}:test"
    return [sys.executable, "-m", "llm_jax.main", config, f"--workdir={workdir}", *flags]


def environment() -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def left(workdir: Path) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The last checkpoint's arrays, and metrics.jsonl without what depends on time."""
    arrays = flatten(Checkpoints(Workdir(workdir).checkpoints).restore_numpy(STEPS))
    lines = [json.loads(line) for line in Workdir(workdir).metrics.read_text().splitlines()]
    return arrays, [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def last_step(workdir: Path) -> int:
    return max(Checkpoints(Workdir(workdir).checkpoints).steps(), default=0)


def wait_for_progress(workdir: Path, process: subprocess.Popen) -> None:
    """Returns once a newer checkpoint is there than before."""
    before, deadline = last_step(workdir), time.monotonic() + 120
    while last_step(workdir) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path):
    subprocess.run(command(tmp_path / "whole"), env=environment(), check=True, capture_output=True)
    rng, kills, reached = random.Random(0), 0, []
    while True:
        process = subprocess.Popen(
            command(tmp_path / "killed"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Every other kill comes as early as it may, every other one while it steps and saves.
        if kills >= KILLS:
            assert process.wait() == 0
            break
        if kills % 2:
            wait_for_progress(tmp_path / "killed", process)
        time.sleep(rng.uniform(0.0, 3.0 if kills % 2 else 8.0))
        assert process.poll() is None, f"the run ended after {kills} kills: raise STEPS"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        reached.append(last_step(tmp_path / "killed"))
    assert len(set(reached)) > KILLS // 3, f"the kills do not fall all over the run: {reached}"
    arrays, lines = left(tmp_path / "killed")
    expected_arrays, expected_lines = left(tmp_path / "whole")
    assert lines == expected_lines
    assert arrays.keys() == expected_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected_arrays[name], err_msg=name)
