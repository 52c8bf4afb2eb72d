"""Checkpoints: equal after a round trip on any mesh, every damage found and named, never fewer than one good."""

import json
import os
import pathlib
import shutil
import subprocess
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.base.errors import RunError, UserError
from llm_jax.storage import atomic, commits
from llm_jax.storage.checkpoints import Checkpoints


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def mesh_sharding(shape, names, spec):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    return NamedSharding(mesh, PartitionSpec(*spec))


def make_state(sharding=None, scale=1.0):
    weight = jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8) * scale, sharding)
    return {
        "params": {"policy": {"weight": weight, "bias": jnp.ones((3,), jnp.bfloat16)}},
        "opt_state": (Moments({"weight": weight * 2}, jnp.asarray(7, jnp.int32)), ()),
        "step": jnp.asarray(5, jnp.int32),
    }


def abstract(tree, sharding=None):
    def describe(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if leaf.ndim == 2 else leaf.sharding)

    return jax.tree.map(describe, tree)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def restored(found):
    assert found is not None
    return found


@pytest.fixture
def three(tmp_path):
    """Checkpoints of steps 1, 2, 3 whose weights are scaled by the step."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(scale=step), {"layout": {"0": [0, 1]}, "note": step})
    checkpoints.wait()
    return Checkpoints(tmp_path / "checkpoints", keep_last=3)


def data_file(checkpoints, step):
    """The largest file of a checkpoint, which holds arrays."""
    files = [path for path in pathlib.Path(checkpoints.path(step) / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_nothing_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.steps() == []
    assert checkpoints.restore(abstract(make_state())) is None
    checkpoints.clean()


def test_restores_bit_for_bit_on_another_mesh(tmp_path):
    state = make_state(mesh_sharding((8,), ("data",), ("data",)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state, {"layout": "x"})
    checkpoints.wait()
    other = mesh_sharding((2, 4), ("data", "tensor"), ("tensor", "data"))
    step, tree, meta = restored(Checkpoints(tmp_path).restore(abstract(state, other)))
    assert (step, meta["layout"], meta["format"], meta["step"]) == (5, "x", 1, 5)
    assert_same(tree, state)
    assert tree["params"]["policy"]["weight"].sharding.is_equivalent_to(other, 2)


def test_the_caller_may_donate_and_change_its_meta_at_once(tmp_path):
    state = make_state(mesh_sharding((8,), ("data",), ("data",)))
    want = jax.tree.map(np.array, state)
    more = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    meta = {"totals": {"tokens": 1}}
    checkpoints.save(1, state, meta)
    meta["totals"]["tokens"] = 2
    for _ in range(5):
        state = more(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    _, tree, meta = restored(checkpoints.restore(abstract(state)))
    assert_same(tree, want)
    assert meta["totals"] == {"tokens": 1}


def test_numpy_and_parts(three):
    tree = three.restore_numpy(2)
    assert tree["opt_state"]["0"]["mu"]["weight"][0, 1] == 4.0
    np.testing.assert_array_equal(three.restore_numpy(3, "params/policy")["weight"], 3 * np.arange(64.0).reshape(8, 8))
    only = {"params": abstract(make_state())["params"]}
    with pytest.raises(UserError, match="has an array opt_state/0/count that this run has no place for"):
        three.restore(only)
    assert_same(restored(three.restore(only, partial=True))[1], {"params": make_state(scale=3)["params"]})
    with pytest.raises(UserError, match="nothing below 'frozen'"):
        three.restore_numpy(3, "frozen")


@pytest.mark.parametrize(
    "name, leaf, message",
    [
        ("weight", jax.ShapeDtypeStruct((8, 9), jnp.float32), r"weight is float32\[8, 8\], not float32\[8, 9\]"),
        ("bias", jax.ShapeDtypeStruct((3,), jnp.float32), r"bias is bfloat16\[3\], not float32\[3\]"),
        ("value", jax.ShapeDtypeStruct((1,), jnp.float32), "no array params/policy/value"),
    ],
)
def test_arrays_that_differ_are_named(three, name, leaf, message):
    wanted = abstract(make_state())
    wanted["params"]["policy"][name] = leaf
    with pytest.raises(UserError, match=message):
        three.restore(wanted)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage, reason", [
    (flip_a_bit, "another SHA-256"),
    (truncate, r"bytes instead of \d+"),
    (lambda path: path.unlink(), "is missing"),
])  # fmt: skip
def test_damage_is_found_named_and_passed_over(three, damage, reason, capsys):
    file = data_file(three, 3)
    damage(file)
    step, tree, meta = restored(three.restore(abstract(make_state())))
    assert (step, meta["note"]) == (2, 2)
    assert_same(tree, make_state(scale=2))
    warning = capsys.readouterr().err
    assert file.name in warning and "step_00000003" in warning and len(warning.splitlines()) == 1
    with pytest.raises(UserError, match=reason):
        three.restore(abstract(make_state()), step=3)


def test_every_file_is_covered(three):
    """Whatever file of the newest checkpoint is damaged, the predecessor is what comes back."""
    folder = pathlib.Path(three.path(3))
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        whole = path.read_bytes()
        flip_a_bit(path)
        assert Checkpoints(three.directory).newest_good() == 2, path
        path.write_bytes(whole)
    assert Checkpoints(three.directory).newest_good() == 3


def test_all_corrupt_is_an_error(three):
    for step in (1, 2, 3):
        truncate(data_file(three, step))
    with pytest.raises(UserError, match="every checkpoint in .* is corrupt"):
        three.restore(abstract(make_state()))


def test_an_unknown_format_is_refused(three):
    commit = three.path(3) / "commit.json"
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "format": 99}))
    with pytest.raises(UserError, match="has format 99; this version reads format 1"):
        three.restore(abstract(make_state()))


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "st', b"\xff", b"[]"])
def test_a_commit_that_cannot_be_read_is_corrupt(three, content, capsys):
    (three.path(3) / "commit.json").write_bytes(content)
    assert three.newest_good() == 2
    assert "commit.json can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("renamed, newest", [(False, 3), (True, 4)])
def test_a_kill_around_the_commit_leaves_none_or_a_whole_one(three, renamed, newest, monkeypatch):
    replace = os.replace

    def killed(source, target):
        if renamed:
            replace(source, target)
        raise KeyboardInterrupt

    three.wait()
    monkeypatch.setattr(atomic.os, "replace", killed)
    monkeypatch.setattr(Checkpoints, "_delete", lambda self, step: None)  # a killed process cleans up nothing
    three.save(4, make_state(scale=4), {})
    with pytest.raises(RunError):
        three.wait()
    monkeypatch.undo()
    assert (three.path(4) / "commit.json").exists() == renamed
    assert Checkpoints(three.directory).newest_good() == newest


def test_leftovers_and_what_is_newer_are_removed_only_on_request(three, capsys):
    (three.path(3) / "commit.json").unlink()
    assert three.steps() == [1, 2]
    assert three.path(3).exists()
    three.clean()
    assert not three.path(3).exists()
    assert "step_00000003: it has no commit.json" in capsys.readouterr().err
    three.clean(newer_than=1)
    assert three.steps() == [1]


def test_a_step_is_saved_again_over_a_leftover(three):
    (three.path(3) / "commit.json").unlink()
    three.save(3, make_state(scale=30), {})
    three.wait()
    assert_same(restored(three.restore(abstract(make_state())))[1], make_state(scale=30))


@pytest.mark.parametrize("best_lower, kept", [(True, [2, 5, 6]), (False, [3, 5, 6])])
def test_keeps_the_newest_and_the_best(tmp_path, best_lower, kept):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1, best_lower=best_lower)
    for step, metric in enumerate([5.0, 1.0, 9.0, float("nan"), None, 4.0], start=1):
        checkpoints.save(step, {"x": jnp.ones(2)}, {}, metric)
    checkpoints.wait()
    assert checkpoints.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in kept]


def test_the_one_just_written_stays_beside_newer_corrupt_ones(three):
    checkpoints = Checkpoints(three.directory, keep_last=1)
    truncate(data_file(checkpoints, 3))
    checkpoints.save(2, make_state(scale=20), {})
    checkpoints.wait()
    assert checkpoints.newest_good() == 2


def test_steps_are_not_held_up_by_the_commit(tmp_path, monkeypatch):
    release = threading.Event()
    original = commits.file_sha256
    monkeypatch.setattr(commits, "file_sha256", lambda path: release.wait(30) and original(path))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), {})
    assert checkpoints.steps() == []
    release.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_failed_save_surfaces_at_the_next_call(three, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(commits, "file_sha256", fail)
        three.save(4, make_state(), {})
        with pytest.raises(RunError) as error:
            three.wait()
    assert str(error.value).endswith(f"no space left on device; last good checkpoint: {three.path(3)}")
    assert not three.path(4).exists()
    three.save(4, make_state(), {})
    three.wait()
    assert three.steps()[-1] == 4


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small tmpfs")
def test_a_disk_that_is_really_full(tmp_path, capfd):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        state = {"x": jnp.ones((500, 1000))}
        checkpoints = Checkpoints(small / "checkpoints")
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
        with pytest.raises(
            RunError, match="checkpoint of step 2 .* no space left on device; last good checkpoint: .*1$"
        ):
            checkpoints.wait()
        assert "Traceback" not in capfd.readouterr().err
        assert Checkpoints(small / "checkpoints").newest_good() == 1
        assert [path.name for path in (small / "checkpoints").iterdir()] == ["step_00000001"]
    finally:
        subprocess.run(["umount", small], check=True)
