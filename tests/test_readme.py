"""What README.md tells to type is accepted, and what it says exists does."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from llm_jax import describe, generate, main, report, show_data, tune
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_names
from llm_jax.jobs.config import JOBS
from llm_jax.jobs.registry import load_config
from llm_jax.jobs.tune import read_shape
from llm_jax.kernels.tuning import tuning_of
from llm_jax.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python -m (llm_jax\.\w+) (.*)$", README, re.MULTILINE)


def arguments(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def test_the_commands_are_found():
    doors = ("main", "generate", "show_data", "convert", "describe", "report", "score", "tune")
    assert {module for module, _ in COMMANDS} == {f"llm_jax.{door}" for door in doors}


@pytest.mark.parametrize(("module", "line"), COMMANDS, ids=[f"{m} {a}"[:60] for m, a in COMMANDS])
def test_commands_are_accepted(module, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert callable(importlib.import_module(module).main)
    argv = arguments(line)
    if module == "llm_jax.generate":
        assert generate.make_parser().parse_all(argv).model
    elif module == "llm_jax.convert":
        assert len(argv) == 2
    elif module == "llm_jax.report":
        assert report.parse(argv)[0]
    elif module == "llm_jax.score":
        assert importlib.import_module(module).parse(argv)[0]
    elif module == "llm_jax.describe":
        assert describe.parse(argv)[0]
    elif module == "llm_jax.tune":
        op, given, *_ = tune.parse(argv)
        assert read_shape(given["--shape"], tuning_of(op))
    else:
        if module == "llm_jax.main":
            parsed = main.parse(argv)
            config, overrides = parsed.config, parsed.overrides
        else:
            config, overrides, _ = show_data.parse(argv)
        assert config is not None
        file = load_config(config)
        assert {name for name, _ in overrides} <= set(field_names(JOBS[file.job]))
        assert main.config_help(config, overrides)


def test_a_wrong_flag_would_be_found():
    with pytest.raises(UserError):
        main.parse(arguments("--confg=configs/dpo.py  # trains"))


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE))
    assert {"quickstart", "test"} <= named <= set(targets)


def test_named_files_and_rooms_exist():
    for path in re.findall(r"`?\b((?:configs|tests|llm_jax)/[\w/]+\.py)\b", README):
        assert (ROOT / path).is_file(), path
    table = README.partition("## The house")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len(cells) >= 8
    for name in re.findall(r"`([\w/]+)`", " ".join(cells)):
        path = ROOT / "llm_jax" / name
        assert path.is_dir() if name.endswith("/") else path.with_suffix(".py").is_file(), name
    assert (ROOT / "llm_jax" / "models" / "families").is_dir()


def test_every_family_is_named():
    table = README.partition("### Models")[2].partition("\n### ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows[1:]))) == sorted(FAMILIES)
    smallest = ROOT / "llm_jax" / "models" / "families" / "mistral.py"
    assert f"`mistral.py` is the smallest, {len(smallest.read_text().splitlines())} lines" in table
