import errno
import os

import pytest

from llm_jax.storage import atomic, write_atomically


@pytest.mark.parametrize("content, stored", [("é\n", "é\n".encode()), (b"\xff", b"\xff"), ("", b"")])
def test_writes_and_replaces(tmp_path, content, stored):
    for before in (None, b"longer than what comes"):
        if before is not None:
            (tmp_path / "f").write_bytes(before)
        write_atomically(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == stored
        assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, step, error):
    def fail(*arguments):
        raise error

    write_atomically(tmp_path / "old", "old")
    monkeypatch.setattr(atomic.os, step, fail)
    for name in ("old", "new"):
        with pytest.raises(type(error)):
            write_atomically(tmp_path / name, "new")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"
