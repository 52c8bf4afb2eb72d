"""SIGTERM at random moments of a real run, from its first import to its last file: status 75 each time, one line, and
the same command goes on to the result of the run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.base.trees import flatten
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from llm_jax.training.metrics import read_metrics
from tests.jobs.conftest import CONFIGS

STEPS, TIMES = 400, 20
FIELDS = {"train.steps": STEPS, "train.checkpoint.every": 50, "train.eval_every": 100, "train.log_every": 7,
          "task_eval.problems": 8, "mesh.data": 1}  # fmt: skip


def command(workdir: Path) -> list[str]:
    flags = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    config = f"--config={CONFIGS / 'pretrain.py'}:test"
    return [sys.executable, "-m", "llm_jax.main", config, f"--workdir={workdir}", *flags]


def left(workdir: Path) -> tuple[dict[str, bytes], list[dict], bytes, bytes]:
    run = Workdir(workdir)
    arrays = flatten(Checkpoints(run.checkpoints).restore_numpy(STEPS))
    lines = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(run.metrics)]
    weights = (run.export / "model.safetensors").read_bytes()
    return {name: array.tobytes() for name, array in arrays.items()}, lines, weights, run.samples.read_bytes()


@pytest.mark.slow
def test_sigterm_at_twenty_random_moments(tmp_path):
    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    whole, chance = time.monotonic() - began, random.Random(int(os.environ.get("LLM_JAX_KILL_SEED", "0")))
    run, statuses, saved = tmp_path / "stopped", [], []
    while len(statuses) < TIMES:
        process = subprocess.Popen(command(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            # Every other moment is anywhere; the others are early, since a stopped run has less before it each time.
            process.wait(chance.uniform(0, whole if len(statuses) % 2 else whole / 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        if process.returncode == 0:  # The moment came too late; so begin again, to have twenty.
            saved.append(0)
            subprocess.run(["rm", "-r", run], check=True)
            continue
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in said, said
        if process.returncode == -signal.SIGTERM:
            assert not said, "a signal that came before the command could take it, but not before it did something"
        else:
            assert process.returncode == 75 and len(errors) == 1, said
            assert errors[0].endswith("the same command continues"), said
        statuses.append(process.returncode)
        saved.append(max(Checkpoints(Workdir(run).checkpoints).steps(), default=0))
    assert statuses.count(75) >= TIMES * 3 // 4, statuses
    assert len(set(saved)) > 3, f"the moments do not fall all over the run: {saved}"
    subprocess.run(command(run), check=True, capture_output=True)
    assert left(run) == left(tmp_path / "whole")
