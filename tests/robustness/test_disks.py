"""A full disk, one that can't be written to any more, and a store that refuses, at every kind of write of a real run.

Each ends with one line and status 1 (2 where it is the workdir that can't be written to at the start), loses no
checkpoint that was there, and is finished by the same command once the disk is mended, with the uninterrupted result.
"""

import contextlib
import errno
import fnmatch
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_jax.base.door import run_door
from llm_jax.base.trees import flatten
from llm_jax.jobs import setup
from llm_jax.main import main
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from tests.jobs.conftest import CONFIGS
from tests.robustness.disks import small_disk
from tests.storage.fake_store import STORE

STEPS = 4
FLAGS = {"train.steps": STEPS, "train.checkpoint.every": 2, "train.log_every": 1, "train.eval_every": 2,
         "task_eval.problems": 1, "task_eval.max_tokens": 2, "data.path": "text", "data.window": 64, "mesh.data": 1,
         "tokenizer.vocab_size": 300}  # fmt: skip

# Kind of write: the files it is of.
KINDS = {
    "lock": "*/lock*", "config": "*/run/config.json*", "data": "*/data/*",
    "tokenizer": "*/tokenizer/tokenizer.json*", "architecture": "*/model.json*",
    "summary": "*/data/summary.json*", "metrics": "*/metrics.jsonl",
    "tensorboard": "*/tensorboard/*", "first checkpoint": "*/step_00000002/*",
    "checkpoint": "*/step_00000004/*", "commit": "*/step_00000004/commit.json*",
    "samples": "*/samples.jsonl*", "weights": "*/export/*safetensors*",
    "export": "*/export/config.json*", "report": "*/report.html*", "done": "*/done.json*",
}  # fmt: skip
# Half a minute of tests; the others, three minutes, are slow ones.
FAST = {("data", "full"), ("metrics", "full"), ("checkpoint", "read-only"), ("weights", errno.ENOSPC)}


def each(*hows: Any) -> list[Any]:
    pairs = [(kind, how) for kind in KINDS for how in hows]
    return [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in pairs]


_watching: list[Callable[[str], None]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str) and set(arguments[1] or "") & set("wa+x"):
        _watching[0](arguments[0])


sys.addaudithook(_audit)


@contextlib.contextmanager
def before_write(kind: str, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Calls `act` once, when a file of the kind is about to be written. What was about to be is in the list."""
    pattern = KINDS[kind]
    struck: list[str] = []

    def strike(path: str) -> None:
        if not struck and fnmatch.fnmatch(path, pattern):
            struck.append(path)
            act()

    # Rows and arrays are written by libraries in C++, whose files Python does not see.
    prepare, save = setup.prepare, Checkpoints.save

    def preparing(*arguments: Any) -> Any:
        strike(f"{arguments[3]}/rows")
        return prepare(*arguments)

    def saving(self: Checkpoints, step: int, *arguments: Any) -> None:
        self.wait()
        strike(f"{self.path(step)}/state")
        save(self, step, *arguments)

    monkeypatch.setattr(setup, "prepare", preparing)
    monkeypatch.setattr(Checkpoints, "save", saving)
    _watching.append(strike)
    try:
        yield struck
    finally:
        _watching.clear()
        monkeypatch.undo()


def train(workdir: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The status of a run and its lines of error."""
    flags = [f"--config.{name}={value}" for name, value in FLAGS.items()]
    capsys.readouterr()
    status = run_door(main, [f"--config={CONFIGS / 'pretrain.py'}:test", f"--workdir={workdir}", *flags])
    said = capsys.readouterr().err
    assert "Traceback" not in said, said
    return status, [line for line in said.splitlines() if line.startswith("error: ")]


def arrays(workdir: str) -> dict[str, bytes]:
    found = Checkpoints(Workdir(workdir).checkpoints).restore_numpy(STEPS)
    return {name: array.tobytes() for name, array in flatten(found).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A folder with a text, and what an uninterrupted run makes of it."""
    folder, before = tmp_path_factory.mktemp("disks"), os.getcwd()
    os.chdir(folder)
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"Text number {i} of forty, on which nothing depends. " * 20)
    flags = [f"--config.{name}={value}" for name, value in FLAGS.items()]
    assert run_door(main, [f"--config={CONFIGS / 'pretrain.py'}:test", "--workdir=whole", *flags]) == 0
    yield folder, arrays("whole")
    os.chdir(before)


def steps(workdir: str) -> list[int]:
    return Checkpoints(Workdir(workdir).checkpoints).steps()


@pytest.mark.parametrize("kind, how", each("full", "read-only"))
def test_a_disk(whole, tmp_path, monkeypatch, capsys, kind, how):
    monkeypatch.chdir(whole[0])
    with small_disk(tmp_path / "small") as disk:
        workdir = str(disk.folder / "run")
        with pytest.MonkeyPatch.context() as patched:
            with before_write(kind, disk.fill if how == "full" else disk.forbid, patched) as struck:
                status, errors = train(workdir, capsys)
        assert struck, f"no {kind} was written"
        assert len(errors) == 1, errors
        assert ("no space left on device" if how == "full" else "ead-only file system") in errors[0], errors
        assert status == (2 if how == "read-only" and kind == "lock" else 1)
        done = {"checkpoint": [2], "commit": [2], "samples": [2, 4], "weights": [2, 4], "export": [2, 4]}
        if kind in done:
            assert steps(workdir) == done[kind]
        disk.mend()
        # It could not be given back; but then the process that held it is still this one.
        Path(workdir, "lock").unlink(missing_ok=True)
        assert train(workdir, capsys) == (0, [])
        assert arrays(workdir) == whole[1]


@pytest.mark.parametrize("kind, code", each(errno.ENOSPC, errno.EACCES, errno.EIO))
def test_a_store(whole, tmp_path, monkeypatch, capsys, kind, code):
    monkeypatch.chdir(whole[0])
    monkeypatch.setattr(STORE, "root", tmp_path / "store")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    with STORE.failing(KINDS[kind], code) as fault:
        status, errors = train("fake://b/run", capsys)
    assert fault.seen, f"no {kind} was written"
    if kind == "report":  # A page that is made again at any time, from a run that is done.
        assert (status, errors) == (0, [])
        return
    said = "no space left on device" if code == errno.ENOSPC else os.strerror(code).lower()
    assert len(errors) == 1 and said in errors[0].lower(), errors
    assert status == (2 if kind == "lock" and code != errno.ENOSPC else 1)
    assert train("fake://b/run", capsys) == (0, [])
    assert arrays("fake://b/run") == whole[1]
