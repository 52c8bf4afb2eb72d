"""From `FILE.py[:variant]` to a job's checked configuration. Nothing here imports jax."""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_jax.base.config import apply_overrides, bind
from llm_jax.base.errors import UserError
from llm_jax.base.nearest import nearest
from llm_jax.jobs.config import JOBS


@dataclass(frozen=True)
class ConfigFile:
    """What a config file says, before overrides."""

    path: Path
    variant: str
    values: dict[str, Any]
    """The fields it sets, `job` among them."""
    required: tuple[str, ...]
    """Fields it leaves to the command line (`config_dict.required_placeholder`)."""
    doc: str

    @property
    def label(self) -> str:
        """The file as a person would name it."""
        path = os.path.relpath(self.path)
        return f"{path if not path.startswith('..') else self.path}{f':{self.variant}' if self.variant else ''}"

    @property
    def name(self) -> str:
        """What its runs are called; part of a folder's name."""
        return re.sub(r"[^\w.-]+", "_", f"{self.path.stem}-{self.variant}" if self.variant else self.path.stem)

    @property
    def job(self) -> str:
        return self.values["job"]

    def missing(self, overrides: Iterable[tuple[str, str]]) -> list[str]:
        """The required fields that `overrides` don't give."""
        given = dict(overrides)
        return [dotted for dotted in self.required if dotted not in given]

    def resolve(self, overrides: Iterable[tuple[str, str]] = (), *, complete: bool = True) -> Any:
        """The job's config dataclass with the file's values and then `(dotted name, text)` overrides.

        With `complete=False` required fields that aren't given keep the job's defaults, as `--help` wants it.

        Raises UserError for a field that is unknown, of the wrong type, or required and not given.
        """
        cls = JOBS[self.job]
        try:
            bind(cls, self.values)
        except UserError as e:
            raise UserError(f"{self.label}: {e}") from None
        overrides = list(overrides)
        values = apply_overrides(self.values, overrides, cls)
        missing = [f"--config.{dotted}=..." for dotted in self.missing(overrides)]
        if missing and complete:
            raise UserError(f"{self.label} needs {' '.join(missing)}")
        return bind(cls, values)


def split_reference(reference: str) -> tuple[str, str] | None:
    """`FILE.py[:variant]` as (file, variant), or None if it doesn't name a Python file."""
    file, colon, variant = reference.rpartition(":")
    if colon and file.endswith(".py"):
        return file, variant
    return (reference, "") if reference.endswith(".py") else None


def load_config(reference: str, *, folders: Sequence[Path] = (Path(),)) -> ConfigFile:
    """Runs a config file, found in the first of `folders` that has it, and takes its values.

    A file's `VARIANTS`, if it has that mapping, says which names `get_config` takes.
    Raises UserError if there is no such file or variant, or if the file itself is wrong.
    """
    parts = split_reference(reference)
    if parts is None:
        raise UserError(f"{reference}: a config is a Python file, FILE.py or FILE.py:variant")
    file, variant = parts
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        raise UserError(f"{file}: no such config file{_suggestion(file, folders)}")
    # Not resolved: a link keeps the name it was given.
    path = Path(os.path.abspath(path))
    module = _guarded(path, lambda: _execute(path))
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise UserError(f"{file} has no get_config")
    variants = getattr(module, "VARIANTS", None)
    if isinstance(variants, Mapping):
        if variant not in variants:
            names = ", ".join(name for name in variants if name)
            raise UserError(f"unknown variant {variant!r} of {file}; it has: {names}")
        # Two names of one variant are one run; the default's name is the empty one.
        variant = next(name for name in variants if variants[name] is variants[variant])
    elif variant and not inspect.signature(get_config).parameters:
        raise UserError(f"unknown variant {variant!r} of {file}; it has none")
    config = _guarded(path, lambda: get_config(variant) if variant else get_config())
    if not hasattr(config, "keys"):
        raise UserError(f"{file}: get_config returned {type(config).__name__}, not a ConfigDict")
    required: list[str] = []
    values = _values(config, "", required)
    job = values.get("job")
    if not isinstance(job, str) or job not in JOBS:
        near = nearest(job, JOBS) if isinstance(job, str) else None
        raise UserError(f"{file}: config.job={job!r} is not a job; " + (f"the nearest is {near}" if near else _jobs()))
    return ConfigFile(path, variant, values, tuple(required), inspect.getdoc(module) or "")


def job_module(job: str) -> ModuleType:
    """The module that does a job: `source_manifest`, `check`, `prepare`, `run` (see `jobs.graph`)."""
    return importlib.import_module(f"llm_jax.jobs.{job}")


def job_summary(job: str) -> str:
    """The first line of a job's module, read without importing it."""
    spec = importlib.util.find_spec(f"llm_jax.jobs.{job}")
    return first_doc_line(Path(spec.origin)) if spec and spec.origin else ""


def first_doc_line(path: Path) -> str:
    """The first line of a Python file's docstring, or ''."""
    try:
        doc = ast.get_docstring(ast.parse(path.read_text()))
    except (SyntaxError, ValueError):
        return ""
    return (doc or "").split("\n")[0]


def _values(config: Any, prefix: str, required: list[str]) -> dict[str, Any]:
    """A ConfigDict as plain values; the names of its unset required placeholders go to `required`."""
    from ml_collections import config_dict

    values = {}
    for key in config.keys():  # noqa: SIM118  items() would read the required ones
        try:
            value = config[key]
        except config_dict.RequiredValueError:
            required.append(f"{prefix}{key}")
            continue
        values[key] = _values(value, f"{prefix}{key}.", required) if hasattr(value, "keys") else value
    return values


def _execute(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_llm_jax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _guarded[T](path: Path, run: Callable[[], T]) -> T:
    """What `run` returns; what a config file raises is the user's error, in one line with the file and its line."""
    try:
        return run()
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        line = e.lineno if isinstance(e, SyntaxError) else (lines or [None])[-1]
        where = f"{os.path.relpath(path)}" + (f", line {line}" if line else "")
        raise UserError(f"{where}: {type(e).__name__}: {e.msg if isinstance(e, SyntaxError) else e}") from None


def _suggestion(file: str, folders: Iterable[Path]) -> str:
    beside = [f for folder in folders for f in (folder / file).parent.glob("*.py")]
    near = nearest(Path(file).name, [f.name for f in beside])
    return f"; the nearest is {os.path.join(os.path.dirname(file), near)}" if near else ""


def _jobs() -> str:
    return f"jobs are {', '.join(JOBS)}"
