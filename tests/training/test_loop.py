"""The loop: what it writes, that it resumes bit for bit, and how it stops."""

import dataclasses
import json
import os
import signal
import threading
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.base.errors import Interrupted, RunError, UserError
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.plan import make_plan
from llm_jax.storage import commits
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from llm_jax.training.config import CheckpointConfig, TrainConfig
from llm_jax.training.loop import check_train_config, train
from llm_jax.training.metrics import Accumulator, MetricsFile, last_values, read_metrics
from tests.training.tiny_job import tiny_job


def config(steps: int = 20, every: int = 6, checkpoint: Any = None, **fields: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"batch_size": 8, "microbatches": 2, "log_every": 4, "eval_every": 10}
    return TrainConfig(steps=steps, checkpoint=CheckpointConfig(every=every, **(checkpoint or {})), **defaults | fields)


def workdir(path) -> Workdir:
    made = Workdir(path)
    made.path.mkdir(parents=True)
    return made


def without_perf(made: Workdir) -> list[dict]:
    lines = read_metrics(made.metrics)
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 20 steps: its workdir and final state."""
    made = workdir(tmp_path_factory.mktemp("runs") / "whole")
    return made, train(tiny_job(made, config(), finish=(lambda state: {"eval_exact_match": 0.5},)))


def interrupt_after(steps: int, number=signal.SIGTERM):
    """A `before_step` that sends this process a signal while step `steps` runs."""
    calls = iter(range(1, 10_000))

    def before_step() -> None:
        if next(calls) == steps:
            os.kill(os.getpid(), number)

    return before_step


def test_metrics_lines(whole):
    made, _ = whole
    lines = read_metrics(made.metrics)
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (4, False), (8, False), (10, True), (12, False), (16, False), (20, False), (20, True), (20, False),
    ]  # fmt: skip
    assert lines[0].keys() >= {"epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "perf/peak_memory_gb"}
    assert lines[1].keys() >= {"perf/step_time", "perf/tokens_per_s"}
    assert lines[0]["epoch"] == 4 * 8 / 40
    assert lines[-1]["eval_exact_match"] == 0.5
    assert [line["num_tokens"] for line in lines if "num_tokens" in line] == [8 * 64 * s for s in (4, 8, 12, 16, 20)]
    # learning_rate is the logged step's own; loss is the mean of four steps.
    assert lines[1]["learning_rate"] == pytest.approx(0.08)
    assert last_values(made.metrics)["eval_exact_match"] == 0.5
    assert made.report.exists()


def test_a_mean_is_over_the_steps_of_its_interval(whole, tmp_path):
    made = workdir(tmp_path / "each")
    train(tiny_job(made, config(log_every=1)))
    losses = [line["loss"] for line in read_metrics(made.metrics) if "loss" in line]
    logged = [line["loss"] for line in read_metrics(whole[0].metrics) if "loss" in line]
    np.testing.assert_allclose(logged, np.reshape(losses, (5, 4)).mean(1), rtol=1e-8)


def test_keeps_the_last_checkpoints(whole):
    assert Checkpoints(whole[0].checkpoints).steps() == [18, 20]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(whole, tmp_path, number):
    """Stopped in steps 5 and 14, which are no multiples of anything, so that intervals straddle the restarts."""
    made = workdir(tmp_path / "run")
    hook = (lambda state: {"eval_exact_match": 0.5},)
    before = signal.getsignal(number)
    for steps_run, step in ((5, 5), (9, 14)):
        with pytest.raises(Interrupted, match=f"interrupted by {number.name}; step {step} is saved in"):
            train(tiny_job(made, config(), before_step=interrupt_after(steps_run, number), finish=hook))
        assert Checkpoints(made.checkpoints).steps()[-1] == step
        assert made.report.exists()
    assert signal.getsignal(number) == before
    state = train(tiny_job(made, config(), finish=hook))
    assert_same(state, whole[1])
    assert without_perf(made) == without_perf(whole[0])


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    made = workdir(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_job(made, config(), before_step=twice))
    assert Checkpoints(made.checkpoints).steps() == []


def test_a_signal_after_the_last_checkpoint_does_not_wait_for_the_hooks(whole, tmp_path):
    made = workdir(tmp_path / "run")

    def slow(state):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the hook went on")

    with pytest.raises(Interrupted, match="step 20 is saved"):
        train(tiny_job(made, config(), finish=(lambda state: {"eval_other": 1.0}, slow)))
    state = train(tiny_job(made, config(), finish=(lambda state: {"eval_exact_match": 0.5},)))
    assert_same(state, whole[1])
    assert without_perf(made) == without_perf(whole[0])


def test_a_finished_run_goes_on_to_more_steps(whole, tmp_path):
    made = workdir(tmp_path / "run")
    train(tiny_job(made, config(steps=8), finish=(lambda state: {"eval_exact_match": 0.1},)))
    state = train(tiny_job(made, config(), finish=(lambda state: {"eval_exact_match": 0.5},)))
    assert_same(state, whole[1])
    with pytest.raises(UserError, match="step_00000020 is past train.steps=8"):
        train(tiny_job(made, config(steps=8)))


def test_a_corrupt_newest_checkpoint_costs_steps_and_nothing_else(whole, tmp_path, capsys):
    made = workdir(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(tiny_job(made, config(), before_step=interrupt_after(15)))
    commit = made.checkpoints / "step_00000015" / "commit.json"
    commit.write_text(commit.read_text()[:-3])
    state = train(tiny_job(made, config(), finish=(lambda state: {"eval_exact_match": 0.5},)))
    err = capsys.readouterr().err
    assert "step_00000015 is corrupt (commit.json can't be read)" in err and "continuing from step 12" in err
    assert_same(state, whole[1])
    assert without_perf(made) == without_perf(whole[0])


def test_another_mesh_continues(whole, tmp_path):
    made = workdir(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(tiny_job(made, config(), before_step=interrupt_after(9)))
    plan = make_plan(MeshConfig(data=4, tensor=2))
    train(tiny_job(made, config(), plan=plan))
    got, want = ([line["loss"] for line in without_perf(run) if "loss" in line] for run in (made, whole[0]))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_another_grouping_continues(whole, tmp_path):
    """Parameters and moments are regrouped alike, wherever they are in the state."""
    made = workdir(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(tiny_job(made, config(), before_step=interrupt_after(9), layout={"0": [0, 1]}))
    seen = []

    def regroup(tree, before, after):
        seen.append((sorted(tree), before, after))
        return tree

    state = train(tiny_job(made, config(), layout={"0": [0], "1": [1]}, regroup=regroup))
    assert seen == [(["out", "segments"], {"0": [0, 1]}, {"0": [0], "1": [1]})] * 2
    assert_same(state, whole[1])


@pytest.mark.parametrize("save_every, last_good", [(2, "step_00000002"), (50, "no checkpoint was saved before")])
def test_nan_stops_with_the_step_its_rows_and_the_last_good_checkpoint(tmp_path, save_every, last_good):
    """Row 24 is first read by step 4 (batch 3): its rows are named, and no checkpoint is saved from there on."""
    made = workdir(tmp_path / "run")
    with pytest.raises(RunError) as error:
        train(tiny_job(made, config(every=save_every), poisoned=24))
    message = str(error.value)
    rows = " ".join(str(row) for row in (np.arange(8) * 7 + 3 * 8) % 40)
    assert message.startswith(f"step 4 is not finite (loss nan, grad_norm nan); its rows: {rows}; ")
    assert last_good in message and len(message.splitlines()) == 1
    assert all(saved < 4 for saved in Checkpoints(made.checkpoints).steps())
    assert made.report.exists()


def test_a_full_disk_stops_the_run(tmp_path, monkeypatch):
    made = workdir(tmp_path / "run")
    original = commits.file_sha256

    def fills_up(path):
        if "step_00000012" in str(path):
            raise OSError(28, "No space left on device")
        return original(path)

    monkeypatch.setattr(commits, "file_sha256", fills_up)
    with pytest.raises(RunError, match="step 12 .* no space left on device; last good checkpoint: .*step_00000006"):
        train(tiny_job(made, config(steps=200, eval_every=0)))
    assert Checkpoints(made.checkpoints).newest_good() == 6


def test_a_disk_that_fills_up_under_the_metrics(tmp_path, monkeypatch):
    made = workdir(tmp_path / "run")
    original = MetricsFile.append

    def fills_up(self, step, values):
        if step == 8:
            raise OSError(28, "No space left on device", str(self.path))
        return original(self, step, values)

    monkeypatch.setattr(MetricsFile, "append", fills_up)
    with pytest.raises(RunError, match="no space left on device at .*metrics.jsonl; last good .*step_00000006"):
        train(tiny_job(made, config()))


def test_best_checkpoints_need_evaluations(tmp_path):
    made = workdir(tmp_path / "run")
    with pytest.raises(UserError, match="train.checkpoint.every=6 must be a multiple of train.eval_every=10"):
        train(tiny_job(made, config(checkpoint={"keep_best": 1})))
    with pytest.raises(UserError, match="best_metric=eval_los is not a metric of the evaluation; those are: eval_loss"):
        train(tiny_job(made, config(every=10, checkpoint={"keep_best": 1, "best_metric": "eval_los"})))


def test_batch_and_mesh_must_fit():
    plan = make_plan(MeshConfig(data=4, tensor=2))
    check_train_config(config(batch_size=8, microbatches=2), plan)
    with pytest.raises(UserError, match="train.microbatches=3 does not divide train.batch_size=8"):
        check_train_config(config(microbatches=3), plan)
    with pytest.raises(UserError, match=r"mesh.data=4 does not divide the 6 rows .*train.batch_size=12"):
        check_train_config(config(batch_size=12), plan)


def test_numbers_out_of_range():
    plan = make_plan(MeshConfig(data=1))
    for name in ("steps", "batch_size", "microbatches", "log_every", "eval_batches"):
        with pytest.raises(UserError, match=f"^train.{name} is 0; it must be at least 1$"):
            check_train_config(config(**{name: 0}), plan)
    with pytest.raises(UserError, match="^train.eval_every is -1; it must be at least 0$"):
        check_train_config(config(eval_every=-1), plan)
    for name, value, least in (("every", 0, 1), ("keep_last", 0, 1), ("keep_best", -1, 0)):
        broken = TrainConfig(checkpoint=dataclasses.replace(CheckpointConfig(), **{name: value}))
        with pytest.raises(UserError, match=f"^train.checkpoint.{name} is {value}; it must be at least {least}$"):
            check_train_config(broken, plan)
    with pytest.raises(UserError, match="best_metric=loss is no evaluation metric"):
        check_train_config(config(checkpoint={"keep_best": 1, "best_metric": "loss"}), plan)


def test_no_signal_handlers_outside_the_main_thread(tmp_path):
    made = workdir(tmp_path / "run")
    thread = threading.Thread(target=lambda: train(tiny_job(made, config(steps=2))))
    thread.start()
    thread.join()
    assert Checkpoints(made.checkpoints).steps() == [2]


def test_an_interval_goes_through_json_exactly():
    values = np.random.default_rng(0).standard_normal(20).astype(np.float32)
    straight, broken = Accumulator(), Accumulator()
    for value in values:
        straight.add({"loss": value, "num_tokens": 3, "grad_norm": np.float32("inf")})
        broken.add({"loss": value, "num_tokens": 3, "grad_norm": np.float32("inf")})
        broken = Accumulator(json.loads(json.dumps(broken.saved())))
    assert straight.take() == broken.take()
    assert broken.saved()["totals"] == {"num_tokens": 60}


def test_what_is_not_finite_is_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"a": float("nan"), "b": np.float32(0.1), "c": 7, "d": float("-inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "a": None,
        "b": 0.100000001,
        "c": 7,
        "d": None,
    }


def test_cutting_a_file_with_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1}\n{"step": 3}\n{"st')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2, 3]
    file = MetricsFile(path)
    file.cut(step=3, lines=10)
    assert (file.lines, len(path.read_text().splitlines())) == (4, 4)
    file.cut(step=2, lines=10)
    assert file.lines == 3
    file.cut(step=2, lines=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
