"""A run whose every file goes to an object store, killed at random moments: it ends as the one that was not."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from llm_jax.base.trees import flatten
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training.metrics import read_metrics
from tests.storage.fake_store import STORE

PROGRAM = str(pathlib.Path(__file__).parents[1] / "storage" / "on_fake_store.py")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(STORE, "root", tmp_path / "store")
    monkeypatch.setenv("FAKE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    return STORE


def start(arguments: list[str], log: pathlib.Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, PROGRAM, *arguments], stdout=file, stderr=file, env=dict(os.environ))


def left(workdir: str, step: int) -> tuple[dict[str, bytes], list[dict]]:
    """Every array of the last checkpoint, and metrics.jsonl without what depends on time."""
    checkpoints = Checkpoints(f"{workdir}/checkpoints")
    assert checkpoints.newest_good() == step
    arrays = {name: array.tobytes() for name, array in flatten(checkpoints.restore_numpy(step)).items()}
    lines = read_metrics(f"{workdir}/metrics.jsonl")
    return arrays, [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def saving(workdir: str) -> bool:
    keys = STORE._keys(f"{workdir}/checkpoints")
    begun, committed = ({k.split("/")[0] for k in keys if k.endswith(end)} for end in ("", "commit.json"))
    return bool(begun - committed)


def run_killed(arguments: list[str], workdir: str, log: pathlib.Path, kills: int, seed: int, longest: float) -> int:
    """Starts and kills until the run has ended; returns how many kills hit a save."""
    chance, hit, done = random.Random(seed), 0, 0
    while done < kills:
        process = start(arguments, log)
        try:
            if done % 2:
                while not saving(workdir) and process.poll() is None:
                    time.sleep(0.002)
            else:
                time.sleep(chance.uniform(0, longest))
            assert process.poll() is None, f"ended after {done} kills:\n{log.read_text()[-2000:]}"
            process.send_signal(signal.SIGKILL)
            process.wait()
        finally:
            process.kill()
            process.wait()
        hit += saving(workdir)
        done += 1
    process = start(arguments, log)
    assert process.wait(timeout=300) == 0, log.read_text()[-2000:]
    return hit


def tiny(workdir: str, steps: int) -> list[str]:
    # 0.05 s a step: no moment of a kill is past the end.
    return ["tests.training.tiny_job", workdir, str(steps), "5", "0.05"]


def test_four_kills(tmp_path):
    log = tmp_path / "log.txt"
    hit = run_killed(tiny("fake://b/killed", 120), "fake://b/killed", log, kills=4, seed=3, longest=5)
    assert start(tiny("fake://b/whole", 120), log).wait(timeout=120) == 0
    assert left("fake://b/killed", 120) == left("fake://b/whole", 120)
    assert hit and "Traceback" not in log.read_text()
    names = {key.split("/")[0] for key in STORE._keys("fake://b/killed")}
    assert names == {"checkpoints", "metrics.jsonl", "report.html", "tensorboard"}
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.slow
def test_twenty_kills_of_a_real_job(tmp_path):
    """From an empty store: tokenizer, rows, checkpoints, export, samples and report are all made there."""
    config = pathlib.Path(__file__).parents[2] / "configs" / "pretrain.py"
    fields = {"train.steps": 300, "train.checkpoint.every": 2, "train.log_every": 3, "task_eval.problems": 4}

    def command(workdir: str) -> list[str]:
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return ["llm_jax.main", f"--config={config}:test", f"--workdir={workdir}", *flags]

    log = tmp_path / "log.txt"
    hit = run_killed(command("fake://b/killed"), "fake://b/killed", log, kills=20, seed=0, longest=14)
    assert start(command("fake://b/whole"), log).wait(timeout=300) == 0
    assert left("fake://b/killed", 300) == left("fake://b/whole", 300)
    assert hit >= 4 and "Traceback" not in log.read_text()
    names = [
        {"checkpoints" if key.startswith("checkpoints") else key for key in STORE._keys(f"fake://b/{run}")}
        for run in ("killed", "whole")
    ]
    assert names[0] == names[1]
    for name in ("export/model.safetensors", "tokenizer/tokenizer.json", "samples.jsonl"):
        killed, whole = (STORE._file(f"fake://b/{run}/{name}").read_bytes() for run in ("killed", "whole"))
        assert killed == whole, name
