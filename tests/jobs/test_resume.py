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

STEPS, KILLS = 900, 20
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


@pytest.mark.slow
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path):
    started = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), env=environment(), check=True, capture_output=True)
    whole = time.monotonic() - started
    rng, kills, progress = random.Random(0), 0, []
    while True:
        process = subprocess.Popen(
            command(tmp_path / "killed"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Early kills hit the start; later ones come after enough steps that the run gets on.
        patience = rng.uniform(0.2, 0.7) * whole if kills < KILLS else None
        try:
            assert process.wait(patience) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            progress.append(max(Checkpoints(Workdir(tmp_path / "killed").checkpoints).steps(), default=0))
    assert kills >= KILLS, progress
    arrays, lines = left(tmp_path / "killed")
    expected_arrays, expected_lines = left(tmp_path / "whole")
    assert lines == expected_lines
    assert arrays.keys() == expected_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected_arrays[name], err_msg=name)
