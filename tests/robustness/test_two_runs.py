"""Two runs started at once on one workdir: one is done, the other ends with status 2 and names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.storage.workdir import Workdir
from tests.jobs.conftest import CONFIGS
from tests.storage.fake_store import STORE

PROGRAM = str(Path(__file__).parents[1] / "storage" / "on_fake_store.py")


@pytest.mark.parametrize("where", ["run", pytest.param("fake://b/run", marks=pytest.mark.slow)])
def test_two_runs(tmp_path, monkeypatch, where):
    monkeypatch.setattr(STORE, "root", tmp_path / "store")
    environment = os.environ | {"FAKE_STORE": str(tmp_path / "store"), "LLM_JAX_CACHE": str(tmp_path / "cache")}
    command = [
        sys.executable,
        PROGRAM,
        "llm_jax.main",
        f"--config={CONFIGS / 'pretrain.py'}:test",
        f"--workdir={where}",
    ]
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    second = next(i for i, process in enumerate(both) if process.returncode == 2)
    errors = [line for line in said[second].splitlines() if line.startswith("error: ")]
    host = os.uname().nodename
    assert errors == [f"error: workdir {where} is in use by process {both[1 - second].pid} on {host}"]
    assert Workdir(tmp_path / where if where == "run" else where).is_done()
