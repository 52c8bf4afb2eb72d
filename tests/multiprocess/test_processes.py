"""Several processes with gloo between them, against one: equal numbers, one stop step, one line on who died."""

import json
import os
import pathlib
import random
import re
import signal
import time

import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from llm_jax.training.metrics import read_metrics
from tests.multiprocess.launching import job, running, tiny

ROOT = pathlib.Path(__file__).parents[2]
PRETRAIN, SFT, DPO = (str(ROOT / "configs" / name) + ":test" for name in ("pretrain.py", "sft.py", "dpo.py"))


def lines(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in read_metrics(Workdir(workdir).metrics)
    ]


def assert_equal_runs(got: pathlib.Path, want: pathlib.Path) -> None:
    """The same metrics to a relative 1e-5, and the same parameters and moments."""
    ours, theirs = lines(got), lines(want)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in b:
            # While the policy is still its reference, rewards are the rounding of sums of log-probabilities, and
            # which of two is the larger is chance.
            if "accuracies" in name:
                continue
            at = f"step {b['step']}: {name}"
            np.testing.assert_allclose(
                a[name], b[name], rtol=1e-5, atol=1e-5 if "rewards" in name else 1e-7, err_msg=at
            )
    mine, reference = Checkpoints(Workdir(got).checkpoints), Checkpoints(Workdir(want).checkpoints)
    step = reference.newest_good()
    assert step is not None and mine.newest_good() == step
    a, b = flatten(mine.restore_numpy(step)), flatten(reference.restore_numpy(step))
    assert a.keys() == b.keys()
    for name in b:
        # Adam divides by the root of the second moment: where a gradient is tiny, its last bits are everything.
        assert np.linalg.norm(a[name] - b[name]) <= 1e-4 * np.linalg.norm(b[name]) + 1e-8, name


def train(command: list[str], folder: pathlib.Path, count: int, devices: int = 1) -> None:
    with running([command] * count, folder, devices) as run:
        assert run.ends(600) == [0] * count, run.text(0) + run.text(count - 1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """60 steps of the tiny job in one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(tiny(folder / "run", 60), folder, 1)
    return folder / "run"


@pytest.mark.parametrize(("count", "restarted"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_sigterm_to_one_stops_all_at_one_step_and_half_of_them_go_on(tmp_path, alone, count, restarted):
    with running([tiny(tmp_path / "run", 60, sleep=0.1)] * count, tmp_path) as run:
        run.wait_for("tiny 7/60")
        told = run.processes[-1]
        told.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert run.ends(60) == [75] * count, run.text(0)
        seconds = time.monotonic() - begun
        saved = [re.search(r"step (\d+) is saved", run.last_line(i)) for i in range(count)]
        steps = {match[1] for match in saved if match}
        assert all(saved) and len(steps) == 1, [run.last_line(i) for i in range(count)]
        wanted = (
            rf"error: interrupted by SIGTERM to process {count - 1} \(.*:{told.pid}\); .*the same command continues"
        )
        assert all(re.fullmatch(wanted, run.last_line(i)) for i in range(count)), run.last_line(0)
    step = int(steps.pop())
    assert Checkpoints(Workdir(tmp_path / "run").checkpoints).newest_good() == step < 60
    print(f"{count} processes stopped at step {step}, {seconds:.1f} s after SIGTERM to one")
    train(tiny(tmp_path / "run", 60), tmp_path / "again", restarted)
    assert_equal_runs(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("count", "victim"), [(2, 1), (2, 0), pytest.param(4, 2, marks=pytest.mark.slow)], ids=lambda n: str(n)
)
def test_kill_of_one_ends_the_others_naming_it(tmp_path, alone, count, victim):
    with running([tiny(tmp_path / "run", 60, sleep=0.1)] * count, tmp_path) as run:
        run.wait_for("tiny 14/60")
        killed = run.processes[victim]
        killed.kill()
        begun = time.monotonic()
        statuses = run.ends(60)
        seconds = time.monotonic() - begun
        assert statuses == [-9 if i == victim else 1 for i in range(count)]
        for i in set(range(count)) - {victim}:
            wanted = rf"error: process {victim} \(.*:{killed.pid}\) died; last good checkpoint: .*step_0000\d+"
            assert re.fullmatch(wanted, run.last_line(i)), run.text(i)
            assert "Traceback" not in run.text(i) and "Check failure" not in run.text(i)
    print(f"process {victim} of {count} killed: the others ended {seconds:.1f} s later")
    if victim != 1:
        train(tiny(tmp_path / "run", 60), tmp_path / "again", count // 2)
        assert_equal_runs(tmp_path / "run", alone)


def test_different_configs_are_refused_in_all_processes(tmp_path):
    commands = [job(PRETRAIN, tmp_path / "run", f"--config.train.steps={6 + i}") for i in range(2)]
    with running(commands, tmp_path) as run:
        assert run.ends() == [2, 2]
        for i in range(2):
            wanted = rf"error: process 1 \(.*:{run.processes[1].pid}\) differs from process 0: train.steps is 7, not 6"
            assert re.match(wanted, run.last_line(i)), run.text(i)
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_one_process_ends_all(tmp_path):
    commands = [job(PRETRAIN, tmp_path / "run", *([] if i == 0 else ["--config.train.stepz=7"])) for i in range(2)]
    with running(commands, tmp_path) as run:
        assert run.ends() == [2, 2]
        assert run.last_line(1).startswith("error: config.train.stepz=7: no such field"), run.text(1)
        assert run.last_line(0).startswith(f"error: process 1 ({os.uname().nodename}:{run.processes[1].pid}) ended: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 1, ()),
        (4, 1, ()),
        (2, 2, ("--config.mesh.zero=3",)),
        (4, 1, ("--config.mesh.zero=2", "--config.train.microbatches=2")),
        (2, 1, ("--config.mesh.tensor=2", "--config.mesh.data=1", "--config.model.num_kv_heads=2")),
    ],
)
def test_a_job_in_several_processes_equals_one(tmp_path, count, devices, mesh):
    other = [override for override in mesh if "mesh." not in override]
    train(job(PRETRAIN, tmp_path / "one", "--config.mesh.data=1", *other), tmp_path, 1)
    train(job(PRETRAIN, tmp_path / "several", *mesh), tmp_path / "logs", count, devices)
    assert_equal_runs(tmp_path / "several", tmp_path / "one")
    exported = [json.loads((tmp_path / run / "export" / "config.json").read_text()) for run in ("one", "several")]
    assert exported[0] == exported[1]
    assert (tmp_path / "several" / "samples.jsonl").exists() and (tmp_path / "several" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("--config.mesh.zero=3",), ("--config.mesh.tensor=2", "--config.mesh.data=2")])
def test_a_job_from_a_folder_that_each_process_reads_its_part_of(tmp_path, mesh):
    train(job(PRETRAIN, tmp_path / "base", "--config.mesh.data=1", "--config.model.num_kv_heads=2"), tmp_path, 1)
    start = f"--config.init_from={tmp_path / 'base' / 'export'}"
    train(job(SFT, tmp_path / "one", "--config.mesh.data=1", start), tmp_path, 1)
    train(job(SFT, tmp_path / "several", *mesh, start), tmp_path / "logs", 2, 2)
    assert_equal_runs(tmp_path / "several", tmp_path / "one")


@pytest.mark.slow
def test_under_srun_nothing_has_to_be_said(tmp_path, alone):
    with running([tiny(tmp_path / "run", 60)] * 2, tmp_path, slurm=True) as run:
        assert run.ends() == [0, 0], run.text(0)
    assert_equal_runs(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_ends_the_others_too(tmp_path, victim):
    with running([tiny(tmp_path / "run", 400, sleep=0.1)] * 2, tmp_path) as run:
        run.wait_for("tiny 14/400")
        run.processes[victim].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        other = 1 - victim
        assert run.processes[other].wait(timeout=60) == 1
        assert re.fullmatch(rf"error: process {victim} \(.*\) died or hangs; last good.*", run.last_line(other))
    print(f"process {victim} of 2 stopped: the other ended {time.monotonic() - begun:.1f} s later")


@pytest.mark.slow
def test_the_chain_to_dpo_in_two_processes_equals_one(tmp_path):
    """With the reference's log-probabilities computed by both, and the model before loaded by process 0 alone."""
    for name, count in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        with running([job(DPO, folder / "dpo")] * count, folder / "logs", cwd=folder) as run:
            assert run.ends(900) == [0] * count, run.text(0)
    assert_equal_runs(tmp_path / "two" / "dpo", tmp_path / "one" / "dpo")
    for run in ("pretrain", "sft"):
        one, two = (next((tmp_path / name / "runs").glob(f"{run}-*")) for name in ("one", "two"))
        assert one.name == two.name
        assert_equal_runs(two, one)


@pytest.mark.slow
def test_sigterm_to_one_at_any_moment(tmp_path):
    """75 in all, or 0 in all where it came too late; in the end the run is done."""
    chance = random.Random(1)
    stopped = 0
    for attempt in range(12):
        with running([job(PRETRAIN, tmp_path / "run")] * 2, tmp_path / f"logs{attempt}") as run:
            # Before there is a handler, in the first moments of Python, a signal kills.
            run.wait_for("preparing")
            time.sleep(chance.uniform(0, 15))
            run.processes[chance.randrange(2)].terminate()
            statuses = run.ends(120)
            assert statuses in ([75, 75], [0, 0]), run.text(0) + run.text(1)
            assert "Traceback" not in run.text(0) + run.text(1)
        # Each goes on where the one before was stopped, until the run is done.
        if statuses == [0, 0]:
            break
        stopped += 1
    assert stopped >= 2
    train(job(PRETRAIN, tmp_path / "run"), tmp_path / "last", 2)
    train(job(PRETRAIN, tmp_path / "one"), tmp_path / "one-log", 1)
    assert_equal_runs(tmp_path / "run", tmp_path / "one")
