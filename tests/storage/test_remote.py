import errno
import io
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llm_jax.base.errors import RunError, UserError
from llm_jax.storage import growing
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.growing import GrowingFile
from llm_jax.storage.remote import fetch, is_remote, local_copy, publish, to_path
from llm_jax.storage.safetensors import LazyTensors, write_folder
from llm_jax.storage.workdir import Workdir
from tests.storage.fake_store import STORE


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(STORE, "root", tmp_path / "store")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    STORE.calls.clear()
    STORE.writes.clear()
    return STORE


def test_the_store_can_neither_append_nor_rename():
    path = epath.Path("fake://b/x/y")
    path.write_text("1")
    assert path.parent.is_dir() and not path.is_dir() and [p.name for p in path.parent.iterdir()] == ["y"]
    for refused in (lambda: path.open("a"), lambda: path.rename("fake://b/z"), lambda: path.replace("fake://b/z")):
        with pytest.raises(io.UnsupportedOperation):
            refused()
    path.unlink()
    assert not path.parent.exists()


@pytest.mark.parametrize("path", ["s9://bucket/x", "://x"])
def test_an_unknown_scheme_is_named(path):
    with pytest.raises(UserError, match="are not known; gs:// is"):
        to_path(path)


def test_what_brings_the_scheme_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^init_from=gs://b/m: gs:// needs gcsfs: pip install 'llm_jax\[gcs\]'$"):
        to_path("gs://b/m", "init_from=gs://b/m")


def test_whole_objects_take_the_place_of_renames(store):
    write_atomically("fake://b/run/config.json", "one")
    with store.failing("*/config.json", errno.ENOSPC):
        with pytest.raises(OSError):
            write_atomically("fake://b/run/config.json", "two")
    assert epath.Path("fake://b/run/config.json").read_text() == "one"
    assert list(store.root.rglob("*.new")) == []


def test_a_growing_object_is_written_twice_a_minute_and_when_told(store, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(growing.time, "monotonic", lambda: clock[0])
    path = epath.Path("fake://b/run/metrics.jsonl")
    file = GrowingFile(path)
    for second in range(3600):
        clock[0] = float(second)
        file.append(b"%04d\n" % second)
    assert len(store.writes) <= 3600 / growing.SECONDS
    assert path.stat().length >= 5 * (3600 - growing.SECONDS)
    file.flush()
    assert path.read_bytes() == b"".join(b"%04d\n" % second for second in range(3600))
    writes = len(store.writes)
    file.flush()
    assert len(store.writes) == writes
    GrowingFile(path).append(b"after\n")  # of a process that goes on: what is there stays
    GrowingFile(path, b"anew\n")
    assert path.read_bytes() == b"anew\n"


def test_folders_are_published_and_fetched_whole_with_their_mark_last(store, tmp_path):
    folder = epath.Path("fake://b/run/data")
    here, elsewhere = local_copy(folder, "v1"), epath.Path(tmp_path / "other")
    assert (
        not is_remote(here) and here != local_copy(folder, "v2") and local_copy(tmp_path, "v1") == epath.Path(tmp_path)
    )
    for name in ("manifest.json", "train/rows", "eval/rows"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    publish(here, folder, "manifest.json")
    assert [name.removeprefix("fake://b/run/data/") for name in store.writes] == [
        "eval/rows",
        "train/rows",
        "manifest.json",
    ]
    publish(here, folder, "manifest.json")
    assert len(store.writes) == 3
    (elsewhere / "left").mkdir(parents=True)
    fetch(folder, elsewhere, "manifest.json")
    assert {str(p.relative_to(elsewhere)) for p in Path(elsewhere).rglob("*")} == {
        "manifest.json", "train", "train/rows", "eval", "eval/rows",
    }  # fmt: skip
    gets = store.calls["get"]
    fetch(folder, elsewhere, "manifest.json")
    assert store.calls["get"] == gets + 1
    (folder / "manifest.json").unlink()
    fetch(folder, tmp_path / "third", "manifest.json")
    assert not (tmp_path / "third").exists()


def test_an_export_in_shards(store):
    folder = epath.Path("fake://b/run/export")
    for count in (5, 1):
        arrays = {f"t{i}": np.full((100,), i, np.float32) for i in range(count)}
        write_folder(folder, arrays, max_shard_bytes=800)
        read = LazyTensors(folder)
        assert {name: read[name].tolist() for name in read} == {name: a.tolist() for name, a in arrays.items()}
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def state(scale: float):
    return {"params": {"w": jnp.arange(6.0).reshape(2, 3) * scale}, "step": jnp.int32(scale)}


@pytest.fixture
def two(store):
    checkpoints = Checkpoints("fake://b/run/checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"note": step})
    checkpoints.wait()
    return checkpoints


def test_checkpoints_come_back_from_another_process(two, store):
    fresh = Checkpoints("fake://b/run/checkpoints")
    assert fresh.newest_good() == 2 and fresh.read_meta(2)["note"] == 2
    np.testing.assert_array_equal(fresh.restore_numpy(2)["params"]["w"], np.arange(6.0).reshape(2, 3) * 2)
    np.testing.assert_array_equal(fresh.restore_numpy(1, "params")["w"], np.arange(6.0).reshape(2, 3))
    commits = [i for i, name in enumerate(store.writes) if name.endswith("commit.json")]
    assert commits[-1] == len(store.writes) - 1
    # Nothing of them is kept on the local disk.
    assert two._stage and not list(Path(two._stage.name).iterdir())
    assert fresh._stage and not list(Path(fresh._stage.name).iterdir())


def test_each_byte_is_brought_once(two, store):
    commit = json.loads((two.path(2) / "commit.json").read_text())
    store.calls.clear()
    fresh = Checkpoints("fake://b/run/checkpoints")
    assert fresh.newest_good() == 2
    fresh.restore_numpy(2)
    assert store.calls["get"] <= len(commit["files"]) + 4  # those, and commit.json when it is asked for something


def test_a_flipped_bit_in_the_store_is_found(two):
    file = max((p for p in STORE.root.rglob("*step_00000002*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert Checkpoints("fake://b/run/checkpoints").newest_good() == 1
    assert not any(Path(two._stage.name).iterdir()) if two._stage else True


@pytest.mark.parametrize("code, said", [(errno.ENOSPC, "no space left"), (errno.EIO, "input/output error"),
                                        (errno.EACCES, "permission denied")])  # fmt: skip
@pytest.mark.parametrize("pattern", ["*/state/*", "*/commit.json"])
def test_a_failing_store_keeps_the_last_good_one(two, store, code, said, pattern):
    with store.failing(pattern, code):
        two.save(3, state(3), {})
        with pytest.raises(RunError, match=f"checkpoint of step 3 .*{said}.*; last good checkpoint: .*step_00000002$"):
            two.wait()
    assert Checkpoints("fake://b/run/checkpoints").newest_good() == 2
    two.save(3, state(3), {})
    two.wait()
    assert two.steps() == [2, 3]


def test_a_workdir_that_cannot_be_written_to(store):
    with store.failing("*", errno.EACCES):
        with pytest.raises(UserError, match="workdir fake://b/run can't be written to: Permission denied"):
            with Workdir("fake://b/run").lock():
                pass
