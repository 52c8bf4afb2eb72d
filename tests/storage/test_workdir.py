import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.base.errors import UserError
from llm_jax.storage.workdir import FORMAT, Workdir, is_workdir

HOLD = """
import sys, time
from llm_jax.storage.workdir import Workdir
with Workdir(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_process_at_a_time_and_a_killed_one_is_replaced(tmp_path, holder):
    workdir = Workdir(tmp_path / "run")
    with pytest.raises(UserError, match=f"run is in use by process {holder.pid} on {socket.gethostname()}$"):
        with workdir.lock():
            pass
    holder.kill()
    # Until its parent looks, a killed process is a zombie: it holds nothing any more.
    deadline = time.monotonic() + 10
    while "Z" not in Path(f"/proc/{holder.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]:
        assert time.monotonic() < deadline
    with workdir.lock():
        pass
    holder.wait()
    with workdir.lock():
        pass


def test_a_process_id_that_was_given_out_again_holds_nothing(tmp_path):
    workdir = Workdir(tmp_path)
    (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "start": "1"}))
    with workdir.lock():
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_another_host_is_taken_to_be_at_work(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "1"}))
    with pytest.raises(UserError, match="in use by process 1 on elsewhere; if that process is gone, delete .*lock"):
        with Workdir(tmp_path).lock():
            pass
    assert "elsewhere" in (tmp_path / "lock").read_text()


@pytest.mark.parametrize("text", ["", '{"host": "el', "[]", "{}"])
def test_a_lock_that_was_never_finished_holds_nothing(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with Workdir(tmp_path).lock():
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_the_lock_is_released_after_an_error_and_not_reentered(tmp_path):
    workdir = Workdir(tmp_path)
    with pytest.raises(RuntimeError):
        with workdir.lock():
            raise RuntimeError
    with workdir.lock():
        with pytest.raises(UserError, match="in use"):
            with workdir.lock():
                pass
        assert (tmp_path / "lock").read_text()


def test_many_processes_never_hold_it_together(tmp_path):
    program = """
import os, sys, time
from llm_jax.base.errors import UserError
from llm_jax.storage.workdir import Workdir
had = 0
for _ in range(200):
    try:
        with Workdir(sys.argv[1]).lock():
            fd = os.open(sys.argv[1] + "/inside", os.O_CREAT | os.O_EXCL)
            os.close(fd)
            os.unlink(sys.argv[1] + "/inside")
            had += 1
    except UserError:
        pass
print(had)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(3)
    ]
    counts = [int(p.communicate(timeout=60)[0]) for p in processes]
    assert all(p.returncode == 0 for p in processes)
    assert sum(counts) > 0


def test_config_and_done(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path / "run")
    assert not is_workdir(workdir.path) and not workdir.is_done()
    config = {"format": FORMAT, "name": "sft", "job": "sft", "hash": "abc", "config": {"a": 1}, "parents": {}}
    with workdir.lock():
        workdir.write_config(config)
    assert is_workdir(workdir.path)
    assert workdir.read_config() == config
    workdir.done.write_text('{"ha')
    assert not workdir.is_done()
    workdir.mark_done({"hash": "abc"})
    assert workdir.is_done() and workdir.done_summary() == {"hash": "abc"}
    monkeypatch.chdir(tmp_path)
    assert str(workdir) == "run"


def test_an_unknown_format_is_refused(tmp_path):
    Workdir(tmp_path).write_config({"format": 99, "job": "sft", "config": {}})
    with pytest.raises(UserError, match="format 99"):
        Workdir(tmp_path).read_config()


def test_a_hugging_face_folder_is_no_workdir(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_workdir(tmp_path)
