"""The command line: help and bad input are answered in a moment, without jax."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.base.errors import UserError
from llm_jax.jobs.registry import load_config
from llm_jax.main import parse

ROOT = Path(__file__).parents[1]
HEAVY = ("jax", "jaxlib", "flax", "numpy", "transformers", "tensorflow", "orbax", "grain")
BROKEN = {
    "syntax.py": ("def get_config(:\n", "syntax.py, line 1: SyntaxError: "),
    "raises.py": ("def get_config(variant=''):\n    return 1 / 0\n", "raises.py, line 2: ZeroDivisionError: "),
    "imports.py": ("import no_such_module_at_all\n", "imports.py, line 1: ModuleNotFoundError: No module named"),
    "none.py": ("", "none.py has no get_config"),
    "number.py": ("def get_config(variant=''):\n    return 3\n", "get_config returned int, not a ConfigDict"),
    "jobless.py": ("def get_config(variant=''):\n    return {}\n", "config.job=None is not a job; jobs are pretrain, "),
    "job.py": ("def get_config(variant=''):\n    return {'job': 'sfd'}\n", "'sfd' is not a job; the nearest is sft"),
    "field.py": (
        "def get_config(variant=''):\n    return {'job': 'sft', 'train': {'stepz': 3}}\n",
        "field.py: config.train.stepz=3: no such field; the nearest is config.train.steps",
    ),
}


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs `python -m llm_jax.main` and asserts that it imported nothing heavy."""
    program = f"""
import runpy, sys
sys.argv = ["main", *{list(arguments)!r}]
try:
    runpy.run_module("llm_jax.main", run_name="__main__")
finally:
    heavy = sorted(set({HEAVY!r}) & set(sys.modules))
    assert not heavy, heavy
"""
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_help_names_jobs_and_configs_at_once():
    start = time.monotonic()
    result = command("--help")
    assert time.monotonic() - start < 1.5
    assert result.returncode == 0 and result.stderr == ""
    for word in ("--workdir=DIR", "pretrain", "preference", "configs/dpo.py", "75 interrupted"):
        assert word in result.stdout


def test_help_of_a_config_lists_every_field_with_type_value_and_doc():
    result = command("--config", "configs/dpo.py:test", "--help", "--config.beta=0.7")
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    at = lines.index("  --config.beta=0.7    float")
    doc = "Strength of the pull to the reference. IPO's tau, ORPO's lambda, SimPO's scale of rewards."
    assert lines[at + 1] == f"      {doc}"
    assert "  --config.init_from=sft.py:test    ModelRef | None" in lines
    assert "  --config.train.remat=none    'none' | 'full' | 'dots'" in lines


def test_help_says_which_fields_a_config_leaves_to_you():
    result = command("--config=configs/pretrain.py:llama_8b", "--help")
    assert "  --config.data.path=(required)    str | None" in result.stdout
    assert "  --config.model.hidden_size=4096    int" in result.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--config=configs/sft.py", "--config.train.step=3"], "config.train.step=3: no such field; the nearest is "),
        (["--config=configs/sft.py", "--config.train.steps=ten"], "config.train.steps=ten: expected int"),
        (["--config=configs/sft.py:tset"], "unknown variant 'tset' of configs/sft.py; it has: quickstart, "),
        (["--config=configs/stf.py"], "configs/stf.py: no such config file; the nearest is configs/sft.py"),
        (["--config=configs/sft.txt"], "configs/sft.txt: a config is a Python file, FILE.py or FILE.py:variant"),
        (["--config=configs/sft.py:llama_8b"], "configs/sft.py:llama_8b needs --config.data.path=... --config.init_"),
        (["--config=configs/sft.py", "--workdi=x"], "unknown argument --workdi=x; the nearest is --workdir"),
        (["--config=configs/sft.py", "--train.steps=3"], "unknown argument --train.steps=3; the nearest is --config.t"),
        (["--config=configs/sft.py", "more"], "unknown argument more; see --help"),
        (["--config=configs/sft.py", "--workdir"], "--workdir needs a value: --workdir=..."),
        (["--config=configs/sft.py", "--config.init_from=dpo.py"], "cycle of references: configs/sft.py -> configs/d"),
        (["--config=configs/sft.py", "--config.init_from=no/where"], "init_from=no/where is neither a config file, a"),
        (["--workdir=x"], "--config=FILE.py[:variant] is missing; see --help"),
        ([], "--config=FILE.py[:variant] is missing; see --help"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, said):
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_file_is_one_line_with_its_place(name, tmp_path, monkeypatch):
    text, said = BROKEN[name]
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        load_config(name).resolve()
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("variant", ["x", "quickstart"])
def test_a_config_without_variants_has_none(variant, tmp_path, monkeypatch):
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'job': 'sft'}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("plain.py").job == "sft"
    with pytest.raises(UserError, match="it has none"):
        load_config(f"plain.py:{variant}")


def test_both_ways_to_write_a_value():
    long = parse(["--config", "a.py", "--config.x", "-3", "--workdir", "w"])
    short = parse(["--config=a.py", "--config.x=-3", "--workdir=w"])
    assert long == short
    assert long.overrides == [("x", "-3")]
    assert parse(["--config=a.py", "--config.x=a=b"]).overrides == [("x", "a=b")]
    assert parse(["--config=a.py", "--config.x="]).overrides == [("x", "")]


@pytest.mark.parametrize("variant", ["", ":docstrings", ":test", ":llama_8b"])
@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo"])
def test_every_config_that_ships_resolves(name, variant):
    if (name, variant) == ("pretrain", ":docstrings"):
        pytest.skip("pretraining has no docstring task")
    file = load_config(str(ROOT / "configs" / f"{name}.py{variant}"))
    config = file.resolve([(field, "given") for field in file.required])
    assert config.job == file.job
