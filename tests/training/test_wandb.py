"""W&B, offline: the run's own file holds every line once, under one id, over restarts."""

import json

import pytest

from llm_jax.base.errors import Interrupted, UserError
from llm_jax.storage.workdir import Workdir
from llm_jax.training import loggers as loggers_module
from llm_jax.training.config import LoggingConfig, WandbConfig
from llm_jax.training.loggers import check_logging
from llm_jax.training.loop import train
from llm_jax.training.metrics import read_metrics
from tests.training.test_loop import config, interrupt_after, workdir
from tests.training.tiny_job import tiny_job

LOGGING = LoggingConfig(report_to=("tensorboard", "wandb"), wandb=WandbConfig(mode="offline", tags=("tiny",)))


def sent(made: Workdir) -> tuple[list[dict], list[tuple]]:
    """All lines in the transaction logs of a workdir's offline runs, in order, and `(id, project, name)` of each."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # as at the end of a process; until then their service may still be writing
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    lines, runs = [], []
    for file in sorted(made.path.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while data := store.scan_data():
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                runs.append((record.run.run_id, record.run.project, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                lines.append({k: json.loads(v) for k, v in values.items() if not k.startswith("_")})
    return lines, runs


def numbers(lines: list[dict]) -> list[dict]:
    kept = [{k: v for k, v in line.items() if v is not None and not k.startswith("perf/")} for line in lines]
    return [line for line in kept if line.keys() - {"step", "epoch"}]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def test_every_line_once_over_a_kill_and_a_restart(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    made = workdir(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(tiny_job(made, config(every=8), logging=LOGGING, before_step=interrupt_after(9)))
    # As if killed after step 10's lines with the checkpoint of step 8 the newest.
    (run,) = made.checkpoints.glob("step_00000009")
    run.rename(tmp_path / "gone")
    text = made.metrics.read_text()
    train(tiny_job(made, config(every=8), logging=LOGGING))
    assert made.metrics.read_text().startswith(text)
    lines, runs = sent(made)
    kept = read_metrics(made.metrics)
    assert numbers(lines) == numbers(kept)
    key = json.loads((made.path / "wandb.json").read_text())["id"]
    assert runs == [(key, "llm_jax", "tiny")] * 2


def test_lines_that_a_kill_took_back_are_not_sent_again(tmp_path):
    pytest.importorskip("wandb")
    made = workdir(tmp_path / "run")
    hook = (lambda state: {"eval_exact_match": 0.5},)
    train(tiny_job(made, config(steps=14, every=20), logging=LOGGING))
    (last,) = made.checkpoints.glob("step_00000014")
    last.rename(tmp_path / "gone")
    train(tiny_job(made, config(steps=20), logging=LOGGING, finish=hook))
    lines, _ = sent(made)
    want = numbers(read_metrics(made.metrics))
    # The first command's last step, 14, was logged too; the second, which started over, has no line there.
    assert [line for line in numbers(lines) if line["step"] != 14] == want
    assert [line["step"] for line in numbers(lines)] == sorted(line["step"] for line in numbers(lines))


def test_it_can_be_switched_on_later(tmp_path):
    pytest.importorskip("wandb")
    made = workdir(tmp_path / "run")
    train(tiny_job(made, config(steps=8)))
    assert not (made.path / "wandb.json").exists()
    train(tiny_job(made, config(steps=12), logging=LOGGING))
    assert numbers(sent(made)[0]) == numbers(read_metrics(made.metrics))


def test_what_is_checked_at_the_door(monkeypatch):
    check_logging(LOGGING)
    check_logging(LoggingConfig(report_to=()))
    with pytest.raises(UserError, match="names a logger twice"):
        check_logging(LoggingConfig(report_to=("wandb", "wandb")))
    with pytest.raises(UserError, match="report_to=tensorboard does not name wandb"):
        check_logging(LoggingConfig(wandb=WandbConfig(project="x")))
    monkeypatch.setattr(loggers_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llm_jax\[wandb\]'"):
        check_logging(LOGGING)
