"""Thousands of generated inputs that are wrong, through the commands' own doors and in this process: each ends with
status 2 and one line, none with a traceback, and none is taken.

The fast tests take a part of each kind, drawn anew by nobody: a fixed seed. `make test-slow` takes all.
"""

import contextlib
import importlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_jax import convert, generate
from llm_jax.base.door import run_door
from llm_jax.data import check_records
from llm_jax.data.config import DataConfig
from llm_jax.main import main
from tests.jobs.conftest import CONFIGS
from tests.robustness import bad_checkpoints, bad_configs, bad_records, bad_templates

ALL = 10**9
# Found by building the tokenizer and the rows first, seconds each: for the slow tests.
LATE = (
    "range model.vocab_size=",
    "range data.window=",
    "contradiction ('--config.model.vocab_size",
    "no answer {% for m",
)


class Taken(BaseException):
    """A run was about to begin."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    def run(node: Any) -> None:
        raise Taken

    for job in ("pretrain", "sft", "preference", "reward", "generate"):
        monkeypatch.setattr(importlib.import_module(f"llm_jax.jobs.{job}"), "run", run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample[T](cases: Sequence[T], count: int) -> list[T]:
    early = [case for case in cases if count == ALL or not case.name.startswith(LATE)]  # pyright: ignore[reportAttributeAccessIssue]
    return early if count >= len(early) else random.Random(1).sample(early, count)


def verdict(door: Callable[[list[str]], None], arguments: list[str]) -> str | None:
    """What is wrong with how a command took what is wrong; None where it refused it as it should."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status: Any = run_door(door, arguments)
        except Taken:
            status = "taken"
        except BaseException as error:
            status = repr(error)
    lines = said.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status == 2 and len(errors) == 1 and "Traceback" not in said.getvalue():
        return None
    return f"{status}: {lines[-1:]}"


def refused(verdicts: Iterator[tuple[str, str | None]], least: int) -> None:
    found = list(verdicts)
    assert len(found) >= least
    assert [f"{name} -> {wrong}" for name, wrong in found if wrong is not None] == []


def untouched(folder: Path) -> bool:
    """Whether nothing was trained here."""
    return not list(folder.glob("**/checkpoints")) and not list(folder.glob("**/metrics.jsonl"))


GENERATE = """from ml_collections import ConfigDict
def get_config():
  return ConfigDict({{"job": "generate", "init_from": "{}/pretrain.py:test"}})
"""


@pytest.mark.parametrize("count", [500, pytest.param(ALL, marks=pytest.mark.slow)])
def test_configs(folder, count):
    (folder / "generate.py").write_text(GENERATE.format(CONFIGS))

    def each():
        for case in sample(bad_configs.cases(seed=0), count):
            config = folder / "c.py"
            if case.file is None:
                config = folder / "generate.py" if case.job == "generate" else f"{CONFIGS / case.job}.py:test"
            else:
                config.write_bytes(case.file if isinstance(case.file, bytes) else case.file.encode())
            yield case.name, verdict(main, [f"--config={config}", *case.flags])

    refused(each(), min(count, 2500))
    assert untouched(folder)


def of_job(job: str) -> Any:
    return {"dpo": "preference"}.get(job, job)


def test_the_records_that_are_broken_below_are_good_before(folder):
    for job, formats in bad_records.FORMATS.items():
        for record, _ in formats:
            (folder / "a.jsonl").write_bytes(bad_records.lines(*bad_records.numbered(record, 6)))
            check_records(of_job(job), DataConfig(path="a.jsonl"))


@pytest.mark.parametrize("count", [300, pytest.param(ALL, marks=pytest.mark.slow)])
def test_records(folder, count):
    def each():
        for case in sample(bad_records.cases(seed=0), count):
            file = folder / (f"records.{case.suffix}" if case.suffix else "records")
            file.write_bytes(case.content)
            yield case.name, verdict(main, [f"--config={CONFIGS / case.job}.py:test", f"--config.data.path={file}"])
            file.unlink()

    refused(each(), min(count, 750))
    assert untouched(folder)


def test_the_template_that_is_broken_below_is_good_before(folder, chats):
    (folder / "t.jinja").write_text(bad_templates.GOOD)
    check_records("sft", DataConfig(path=str(chats), chat_template="t.jinja"))


@pytest.fixture
def chats(folder) -> Path:
    said = [[{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant")] for i in range(8)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said))
    return folder / "chats.jsonl"


@pytest.mark.parametrize("count", [120, pytest.param(ALL, marks=pytest.mark.slow)])
def test_templates(folder, chats, count):
    def each():
        for case in sample(bad_templates.cases(seed=0), count):
            (folder / "t.jinja").write_bytes(case.template)
            flags = [f"--config.data.path={chats}", "--config.data.chat_template=t.jinja"]
            yield case.name, verdict(main, [f"--config={CONFIGS / 'sft'}.py:test", *flags])

    refused(each(), min(count, 140))
    assert untouched(folder)


def command(door: str, source: Path, target: Path) -> tuple[Callable[[list[str]], None], list[str]]:
    if door == "convert":
        return convert.main, [str(source), str(target)]
    return generate.main, [str(source), "--prompt", "hi", "--max-tokens", "1"]


def test_the_models_that_are_damaged_below_are_good_before(folder, folders):
    for source in folders:
        for door in ("convert", "generate"):
            with contextlib.redirect_stdout(io.StringIO()):
                assert run_door(*command(door, source, folder / f"{source.name}-{door}")) == 0


@pytest.mark.parametrize("count", [350, pytest.param(ALL, marks=pytest.mark.slow)])
def test_checkpoints(folder, folders, count):
    """Besides, nothing is written where the model was to go, and the damaged folder is as it was."""
    hf, native = folders

    def content(source: Path) -> dict[str, bytes]:
        return {str(file.relative_to(source)): file.read_bytes() for file in source.rglob("*") if file.is_file()}

    def each():
        for case in sample(bad_checkpoints.cases(hf, native, seed=0), count):
            source, target = folder / "source", folder / "target"
            shutil.copytree(hf if case.kind == "hf" else native, source)
            case.damage(source)
            before = content(source)
            wrong = verdict(*command(case.door, source, target))
            if target.exists() or content(source) != before:
                wrong = f"{wrong}; something was written"
            yield case.name, wrong
            shutil.rmtree(source)
            shutil.rmtree(target, ignore_errors=True)

    refused(each(), min(count, 600))
