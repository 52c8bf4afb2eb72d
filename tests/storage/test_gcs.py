"""`gs://` as a person has it: etils over gcsfs, and Orbax over TensorStore, against Google's API served here."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.storage import growing
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.growing import GrowingFile
from llm_jax.storage.remote import fetch, local_copy, publish, to_path
from llm_jax.storage.safetensors import LazyTensors, write_folder
from llm_jax.storage.workdir import Workdir, is_workdir
from llm_jax.training.metrics import read_metrics
from tests.storage.fake_gcs import FakeGCS

pytest.importorskip("gcsfs")


@pytest.fixture(scope="module")
def server():
    """One for all tests: both libraries read its address once."""
    with FakeGCS() as store, pytest.MonkeyPatch.context() as patched:
        for name, value in store.environment().items():
            patched.setenv(name, value)
        yield store


@pytest.fixture
def gcs(server, tmp_path, monkeypatch):
    server.objects.clear()
    server.calls.clear()
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    return server


def test_files_and_folders(gcs, tmp_path):
    folder = to_path("gs://bucket/run")
    assert not folder.exists() and not folder.is_dir() and not is_workdir(folder)
    write_atomically(folder / "config.json", "{}")
    assert folder.is_dir() and (folder / "config.json").read_text() == "{}"
    file = GrowingFile(folder / "metrics.jsonl")
    file.append(b"1\n")
    file.append(b"2\n")
    file.flush()
    assert (folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
    gcs.put("bucket", "run/from/elsewhere", b"x")  # by another process, after this one has listed the folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "from", "metrics.jsonl"]
    copy = local_copy(folder / "data", "v")
    (copy / "train").mkdir(parents=True)
    (copy / "train" / "rows").write_bytes(os.urandom(9_000_000))  # more than one piece
    (copy / "manifest.json").write_text("{}")
    publish(copy, folder / "data", "manifest.json")
    fetch(folder / "data", tmp_path / "other", "manifest.json")
    assert (tmp_path / "other" / "train" / "rows").read_bytes() == (copy / "train" / "rows").read_bytes()
    arrays = {f"t{i}": np.full((64,), i, np.float32) for i in range(5)}
    write_folder(folder / "export", arrays, max_shard_bytes=600)
    read = LazyTensors(folder / "export")
    assert {name: read[name][0] for name in read} == {f"t{i}": i for i in range(5)}
    (folder / "from").rmtree()
    assert "run/from/elsewhere" not in gcs.names()
    assert not {"POST copyTo", "POST rewriteTo"} & set(gcs.calls)


def test_the_lock(gcs, monkeypatch):
    with Workdir("gs://bucket/run").lock():
        with pytest.raises(UserError, match=f"workdir gs://bucket/run is in use by process {os.getpid()}"):
            with Workdir("gs://bucket/run").lock():
                pass
        assert len(gcs.names("run/lock/")) == 1
    assert gcs.names("run/lock/") == []


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints(gcs, monkeypatch, processes):
    """Of one process by way of a local folder, of several straight through TensorStore; each reads the other's."""
    if processes > 1:
        monkeypatch.setattr(Checkpoints, "_is_staged", False)
    state = {"params": {"w": jnp.arange(60_000.0).reshape(200, 300)}, "step": jnp.int32(3)}
    saved = Checkpoints("gs://bucket/run/checkpoints")
    for step in (1, 2, 3):
        saved.save(step, state, {"note": step})
    saved.wait()
    assert saved.steps() == [2, 3]
    names = {name.split("/")[2] for name in gcs.names("run/checkpoints/")}
    assert names == {"step_00000002", "step_00000003"}
    for staged in (True, False):
        monkeypatch.setattr(Checkpoints, "_is_staged", staged)
        fresh = Checkpoints("gs://bucket/run/checkpoints")
        assert fresh.newest_good() == 3 and fresh.read_meta(3)["note"] == 3
        for name, array in flatten(fresh.restore_numpy(3)).items():
            np.testing.assert_array_equal(array, flatten(state)[name])
    largest = max(gcs.names("run/checkpoints/step_00000003/"), key=lambda name: len(gcs.objects["bucket", name][0]))
    data = bytearray(gcs.objects["bucket", largest][0])
    data[len(data) // 2] ^= 4
    gcs.put("bucket", largest, bytes(data))
    assert Checkpoints("gs://bucket/run/checkpoints").newest_good() == 2


@pytest.mark.slow
def test_a_killed_run_ends_as_the_whole_one(gcs, tmp_path, monkeypatch):
    program = str(Path(__file__).parents[1] / "training" / "tiny_job.py")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    log = (tmp_path / "log.txt").open("a")

    def start(workdir: str) -> subprocess.Popen:
        command = [sys.executable, program, workdir, "60", "5", "0.02"]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log)

    chance = random.Random(0)
    for kill in range(3):
        process, had = start("gs://bucket/killed"), len(gcs.names("killed/checkpoints/"))
        while len(gcs.names("killed/checkpoints/")) <= had and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1))
        assert process.poll() is None, f"ended before kill {kill}: {(tmp_path / 'log.txt').read_text()[-2000:]}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    for workdir in ("gs://bucket/killed", "gs://bucket/whole"):
        assert start(workdir).wait(timeout=180) == 0, (tmp_path / "log.txt").read_text()[-3000:]

    def left(workdir: str):
        arrays = flatten(Checkpoints(f"{workdir}/checkpoints").restore_numpy(60))
        lines = read_metrics(f"{workdir}/metrics.jsonl")
        lines = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
        return {name: array.tobytes() for name, array in arrays.items()}, lines

    assert left("gs://bucket/killed") == left("gs://bucket/whole")
    assert growing.SECONDS == 30
