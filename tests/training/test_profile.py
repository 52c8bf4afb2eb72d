"""A trace on request: its files, the steps in it, and what is no range."""

import gzip
import json

import pytest

from llm_jax.base.errors import Interrupted, UserError
from llm_jax.storage.workdir import Workdir
from llm_jax.training.config import CheckpointConfig, ProfileConfig, TrainConfig
from llm_jax.training.loop import train
from llm_jax.training.profile import profiled_steps
from tests.training.test_loop import interrupt_after
from tests.training.tiny_job import tiny_job

CONFIG = TrainConfig(steps=12, batch_size=8, microbatches=2, checkpoint=CheckpointConfig(every=6))


def traced(workdir: Workdir) -> list[list[int]]:
    """The step numbers in each trace of the workdir."""
    files = sorted(workdir.path.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
    for file in files:
        assert list(file.parent.glob("*.xplane.pb"))
    events = [json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] for file in files]
    return [[int(e["args"]["step_num"]) for e in trace if e.get("name") == "train"] for trace in events]


def test_the_steps_asked_for_are_in_the_trace(tmp_path, capsys):
    made = Workdir(tmp_path / "run")
    made.path.mkdir()
    train(tiny_job(made, CONFIG, profile=ProfileConfig("5:8")))
    assert traced(made) == [[5, 6, 7]]
    said = [line for line in capsys.readouterr().err.splitlines() if "profile" in line]
    assert len(said) == 1 and said[0].startswith("profile of steps 5 to 7 in ") and "xprof --logdir" in said[0]


def test_a_signal_ends_the_trace_and_the_next_command_traces_the_rest(tmp_path, capsys):
    made = Workdir(tmp_path / "run")
    made.path.mkdir()
    with pytest.raises(Interrupted):
        train(tiny_job(made, CONFIG, profile=ProfileConfig("1:8"), before_step=interrupt_after(3)))
    assert traced(made) == [[1, 2, 3]]
    train(tiny_job(made, CONFIG, profile=ProfileConfig("1:8")))
    assert sorted(traced(made)) == [[1, 2, 3], [4, 5, 6, 7]]
    assert "profile of steps 4 to 7" in capsys.readouterr().err
    train(tiny_job(made, CONFIG, profile=ProfileConfig("1:8")))
    assert "steps 1 to 7 are done already: no profile of them" in capsys.readouterr().err


def test_none_by_default(tmp_path):
    made = Workdir(tmp_path / "run")
    made.path.mkdir()
    train(tiny_job(made, CONFIG))
    assert not (made.path / "profile").exists()


@pytest.mark.parametrize("steps", ["5", "a:b", "5:", "-1:4", "0:4", "4:4", "5:3", "1:14", "14:20"])
def test_what_is_no_range_of_this_run(steps):
    with pytest.raises(UserError, match="^profile.steps="):
        profiled_steps(ProfileConfig(steps), 12)
    assert profiled_steps(ProfileConfig("1:13"), 12) == range(1, 13)
