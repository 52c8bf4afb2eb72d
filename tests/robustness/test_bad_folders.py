"""Damaged model folders through the four doors that open one: status 2, one line that names the thing, nothing written.
And conversions that were stopped: never taken for complete, finished by the same command."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax import convert, describe, generate
from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.main import main
from llm_jax.models import Decoder, Model, init_params, load, save
from llm_jax.models.config import ModelConfig
from llm_jax.storage.safetensors import LazyTensors
from llm_jax.storage.unfinished import MARK
from tests.jobs.conftest import CONFIGS
from tests.robustness.bad_folders import DAMAGES, Damage, pointer, shard
from tests.robustness.disks import small_disk

Door = tuple[Callable[[list[str]], None], list[str]]
DOORS = ("convert", "generate", "describe", "main")


class Taken(BaseException):
    """A run was about to begin."""


@pytest.fixture(scope="module")
def good(folders, tmp_path_factory) -> Path:
    """A folder in three shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("good") / "model"
    shutil.copytree(folders[0], folder)
    shard(folder, {name: np.array(array) for name, array in LazyTensors(folder).items()})
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    def run(node: Any) -> None:
        raise Taken

    monkeypatch.setattr(importlib.import_module("llm_jax.jobs.sft"), "run", run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "{i}", "completion": "b"}}\n' for i in range(40)))
    return tmp_path


def door(name: str, source: Path) -> Door:
    flags = ["data.path=a.jsonl", "data.window=64", "mesh.data=1", "task_eval.problems=0", f"init_from={source}"]
    return {
        "convert": (convert.main, [str(source), "target"]),
        "generate": (generate.main, [str(source), "--prompt", "hi", "--max-tokens", "1"]),
        "describe": (describe.main, [str(source)]),
        "main": (main, [f"--config={CONFIGS / 'sft.py'}:test", *(f"--config.{flag}" for flag in flags)]),
    }[name]


def ended(call: Door) -> tuple[Any, list[str]]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status: Any = run_door(*call)
        except Taken:
            status = "taken"
    return status, said.getvalue().splitlines()


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", DOORS)
def test_the_folder_that_is_damaged_below_is_good_before(good, name):
    (good / "pytorch_model.bin").write_bytes(b"never read")  # Beside safetensors a pickle is nobody's business.
    assert ended(door(name, good))[0] == ("taken" if name == "main" else 0)
    (good / "pytorch_model.bin").unlink()


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.name)
def test_damaged(good, here, case: Damage):
    source = here / "model"
    shutil.copytree(good, source)
    case.damage(source)
    before = content(here)
    for name in DOORS:
        if name == "describe" and case.config_only:
            continue
        status, lines = ended(door(name, source))
        assert (status, len(lines)) == (2, 1), (name, status, lines)
        for word in case.said:
            assert word in lines[0], (name, lines)
        assert content(here) == before, f"{name} wrote something"


@pytest.mark.parametrize("name", DOORS)
def test_as_processes_of_their_own(good, here, name):
    source = here / "model"
    shutil.copytree(good, source)
    (source / "model-00003-of-00003.safetensors").write_bytes(pointer(10**9))
    call, arguments = door(name, source)
    command = [sys.executable, "-m", call.__module__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"error: {source / 'model-00003-of-00003.safetensors'} is a git-LFS pointer, not the file "
        + ("itself: `git lfs pull` in its folder brings that\n")
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(CONFIGS.parent), "JAX_PLATFORMS": "cpu"}


KILLED = """
import os, signal, sys
from etils import epath
from llm_jax import convert
from llm_jax.storage import atomic, safetensors, unfinished
from llm_jax.storage.checkpoints import Checkpoints
moment = sys.argv.pop(1)

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "tensors":
    safetensors.write_file = lambda file, tensors, metadata: (file.write_bytes(b"half"), kill())
elif moment == "names":
    safetensors._remove_weights = kill
elif moment == "commit":
    Checkpoints.wait = kill
else:
    from llm_jax.models import saving
    write = saving.write_atomically
    saving.write_atomically = lambda path, text: kill() if path.name == moment else write(path, text)
convert.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "to_native, moment",
    [(False, "tensors"), (False, "names"), (False, "config.json"), (True, "commit"), (True, "model.json")],
)
def test_a_conversion_that_is_killed(folders, here, to_native, moment):
    source = folders[0] if to_native else folders[1]
    command = [sys.executable, "-c", KILLED, moment, str(source), "target"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = content(here / "target")
    assert MARK in half and len(half) > 1
    for name in DOORS:
        if name == "convert":
            call = convert.main, ["target", "elsewhere"]
        else:
            call = door(name, Path("target"))
        status, lines = ended(call)
        assert (status, len(lines)) == (2, 1), (name, lines)
    with pytest.raises(UserError, match="target is half written"):
        load("target")
    assert content(here / "target") == half and not (here / "elsewhere").exists()
    # The same command again; what was there is not mixed in.
    (here / "target" / "chat_template.jinja").write_text("left behind")
    assert ended((convert.main, [str(source), "target"]))[0] == 0
    assert ended((convert.main, [str(source), "fresh"]))[0] == 0
    names = {name for name in content(here / "target") if "checkpoints" not in name}
    assert names == {name for name in content(here / "fresh") if "checkpoints" not in name}
    jax.tree.map(np.testing.assert_array_equal, load("target").params, load("fresh").params)


def test_what_a_conversion_never_writes_to(folders, here):
    def said(*names: str) -> str:
        status, lines = ended((convert.main, [str(folders[0]), *names]))
        assert (status, len(lines)) == (2, 1)
        return lines[0]

    (here / "target").mkdir()
    (here / "target" / MARK).write_text(json.dumps({"host": "another", "pid": 1, "start": "2"}))
    assert "is being written by process 1 on another" in said("target")
    (here / "target" / MARK).write_text("{half")
    (here / "target" / "thesis.tex").write_text("")
    assert "beside an unfinished conversion it holds thesis.tex" in said("target")
    (here / "target" / MARK).unlink()
    assert said("target") == "error: target is not empty"
    assert said("a.jsonl") == "error: a.jsonl is a file"
    assert (here / "target" / "thesis.tex").exists()


@pytest.mark.parametrize("to_native", [False, True])
def test_a_conversion_that_fills_the_disk(here, to_native):
    config = ModelConfig(vocab_size=4096, hidden_size=128, intermediate_size=64, num_layers=1, num_heads=2)
    decoder = Decoder(config)
    save(Model(decoder, init_params(decoder, 0), decoder.config), "big")
    if not to_native:
        assert ended((convert.main, ["big", "native"]))[0] == 0
    source = "big" if to_native else "native"
    with small_disk(here / "small", "3m") as disk:
        status, lines = ended((convert.main, [source, str(disk.folder / "target")]))
        assert (status, len(lines)) == (1, 1) and "no space left on device" in lines[0], lines
        with pytest.raises(UserError, match="half written"):
            load(disk.folder / "target")
        subprocess.run(["mount", "-o", "remount,size=64m", disk.folder], check=True)
        assert ended((convert.main, [source, str(disk.folder / "target")]))[0] == 0
        load(disk.folder / "target")
