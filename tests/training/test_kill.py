"""kill -9 at random moments, saves included: the run that was killed ends as the one that was not, bit for bit."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from llm_jax.training.metrics import read_metrics

EVERY = 5


def start(workdir: pathlib.Path, steps: int, log) -> subprocess.Popen:
    command = [
        sys.executable,
        str(pathlib.Path(__file__).parent / "tiny_job.py"),
        str(workdir),
        str(steps),
        str(EVERY),
        "0.01",
    ]
    return subprocess.Popen(command, stdout=log, stderr=log)


def result(path: pathlib.Path, steps: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Parameters, optimizer state, and the lines of metrics.jsonl without `perf/`."""
    checkpoints = Checkpoints(Workdir(path).checkpoints)
    assert checkpoints.newest_good() == steps
    lines = [
        json.dumps({name: value for name, value in line.items() if not name.startswith("perf/")})
        for line in read_metrics(Workdir(path).metrics)
    ]
    return flatten(checkpoints.restore_numpy(steps)), lines


def saving(checkpoints: pathlib.Path) -> bool:
    return any(not (folder / "commit.json").exists() for folder in checkpoints.glob("step_*"))


def kill_somewhere(process: subprocess.Popen, workdir: pathlib.Path, log: pathlib.Path, chance: random.Random) -> str:
    """Kills at a moment of one of three kinds and returns which; "ended" where it was too late."""
    kind = chance.choice(["anywhere", "starting", "saving", "saving"])
    deadline = time.monotonic() + 120
    if kind == "starting":
        time.sleep(chance.uniform(0.0, 3.0))
    else:
        already = log.stat().st_size
        while log.stat().st_size == already and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.5))
        while kind == "saving" and not saving(workdir / "checkpoints") and process.poll() is None:
            time.sleep(0.0005)
    if process.poll() is not None:
        return "ended"
    process.send_signal(signal.SIGKILL)
    process.wait()
    if kind == "saving" and not saving(workdir / "checkpoints"):
        return "just saved"
    return kind


def run_killed(folder: pathlib.Path, steps: int, kills: int, seed: int) -> list[str]:
    """Starts and kills until `kills` happened, then lets the run end. Returns the kinds of the kills."""
    chance, kinds = random.Random(seed), []
    log = folder / "log.txt"
    with log.open("w") as file:
        while len(kinds) < kills:
            process = start(folder / "killed", steps, file)
            try:
                kind = kill_somewhere(process, folder / "killed", log, chance)
            finally:
                process.kill()
            assert kind != "ended", f"the run ended after {len(kinds)} kills:\n{log.read_text()[-2000:]}"
            kinds.append(kind)
        assert start(folder / "killed", steps, file).wait(timeout=300) == 0, log.read_text()[-2000:]
        assert start(folder / "whole", steps, file).wait(timeout=300) == 0, log.read_text()[-2000:]
    assert "Traceback" not in log.read_text()
    return kinds


def check_equal(folder: pathlib.Path, steps: int) -> None:
    (arrays, lines), (want_arrays, want_lines) = result(folder / "killed", steps), result(folder / "whole", steps)
    assert lines == want_lines
    assert arrays.keys() == want_arrays.keys()
    for name, want in want_arrays.items():
        assert arrays[name].tobytes() == want.tobytes(), name
    assert (folder / "killed" / "report.html").exists()


def test_four_kills(tmp_path):
    kinds = run_killed(tmp_path, steps=300, kills=4, seed=1)
    check_equal(tmp_path, steps=300)
    assert {"saving", "just saved"} & set(kinds)


@pytest.mark.slow
def test_twenty_four_kills(tmp_path):
    kinds = run_killed(tmp_path, steps=1500, kills=24, seed=int(os.environ.get("LLM_JAX_KILL_SEED", "0")))
    check_equal(tmp_path, steps=1500)
    assert kinds.count("saving") >= 4, kinds


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small tmpfs")
def test_a_full_disk_ends_with_one_line_and_status_1(tmp_path):
    """The disk takes two checkpoints of some 200 kB, not a third, and keep_last=2 needs room for three."""
    small, log = tmp_path / "small", tmp_path / "log.txt"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=520k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        with log.open("w") as file:
            assert start(small / "killed", 60, file).wait(timeout=120) == 1, log.read_text()[-2000:]
        last = log.read_text().splitlines()[-1]
        # It is the save that fills the disk, but a line of metrics.jsonl may be the first to find it full.
        assert last.startswith("error: ") and "no space left on device" in last and "last good checkpoint: " in last
        assert "Traceback" not in log.read_text()
        checkpoints = Checkpoints(small / "killed" / "checkpoints")
        assert last.endswith(str(checkpoints.path(checkpoints.newest_good() or 0)))
    finally:
        subprocess.run(["umount", small], check=True)


def test_sigterm_exits_75_and_the_same_command_continues(tmp_path):
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = start(tmp_path / "killed", 60, file)
        while "tiny 7/60" not in log.read_text() and process.poll() is None:
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=60) == 75
        last = log.read_text().splitlines()[-1]
        assert last.startswith("error: interrupted by SIGTERM; step ") and last.endswith("the same command continues")
        assert start(tmp_path / "killed", 60, file).wait(timeout=120) == 0
        assert start(tmp_path / "whole", 60, file).wait(timeout=120) == 0
    check_equal(tmp_path, 60)
