"""Runs a config: `python -m llm_jax.main --config=FILE.py[:variant] [--workdir=DIR] [--config.a.b=value ...]`.

Its prerequisites are made first if they are not there yet. Exit status: 0 done, 2 bad configuration or input,
75 interrupted with its state saved (the same command goes on), 1 anything else.

Several processes, on one host or many, are one run when each is given the same command and

    --coordinator=HOST:PORT --processes=N --process=I      with I from 0; process 0 is on HOST, the port is free there

or the same as LLM_JAX_COORDINATOR, LLM_JAX_PROCESSES and LLM_JAX_PROCESS in its environment. Under `srun` and on a
Cloud TPU slice nothing has to be said; `--processes=auto` asks jax on other clusters. All see the same workdir.
"""

import dataclasses
import os
import sys
from pathlib import Path

from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_docs, field_names
from llm_jax.base.join import FLAGS as PLACE_FLAGS
from llm_jax.base.join import join, place
from llm_jax.base.nearest import nearest
from llm_jax.jobs.config import JOBS
from llm_jax.jobs.graph import run
from llm_jax.jobs.registry import first_doc_line, job_summary, load_config

FLAGS = ("--config", "--workdir", *(f"--{flag}" for flag in PLACE_FLAGS), "--help")


@dataclasses.dataclass
class Arguments:
    config: str | None = None
    workdir: str | None = None
    overrides: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    processes: dict[str, str | None] = dataclasses.field(default_factory=dict)
    help: bool = False


def parse(argv: list[str]) -> Arguments:
    """Reads the command line, where `--flag=value` and `--flag value` are the same.

    Raises UserError for an argument it doesn't know.
    """
    arguments = Arguments()
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in ("--help", "-h") and not equals:
            arguments.help = True
            continue
        if flag not in FLAGS and not flag.startswith("--config."):
            fields = [f"--config.{name}" for cls in JOBS.values() for name in field_names(cls)]
            near = nearest(flag, [*FLAGS, *fields]) if flag.startswith("-") else None
            raise UserError(f"unknown argument {word}" + (f"; the nearest is {near}" if near else "; see --help"))
        if not equals:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{flag} needs a value: {flag}=...")
        if flag == "--config":
            arguments.config = value
        elif flag == "--workdir":
            arguments.workdir = value
        elif flag in FLAGS:
            arguments.processes[flag.removeprefix("--")] = value
        else:
            arguments.overrides.append((flag.removeprefix("--config."), value))
    if arguments.config is None and not arguments.help:
        raise UserError("--config=FILE.py[:variant] is missing; see --help")
    return arguments


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.config is None:
        print(usage())
    elif arguments.help:
        print(config_help(arguments.config, arguments.overrides))
    else:
        join(place(arguments.processes, os.environ))
        run(arguments.config, arguments.overrides, arguments.workdir)


def usage() -> str:
    """The command, the jobs, and the config files at hand."""
    lines = [(__doc__ or "").strip(), "", "Jobs (a config file names its own):"]
    lines += [f"  {job:<12}{job_summary(job)}" for job in JOBS]
    configs = sorted(Path("configs").glob("*.py"))
    if configs:
        lines += ["", "Configs here (`--config=FILE --help` lists a config's fields):"]
        lines += [f"  {str(path):<24}{first_doc_line(path)}" for path in configs]
    return "\n".join(lines)


def config_help(reference: str, overrides: list[tuple[str, str]]) -> str:
    """What a config is, and every field it can set: name, type, value under this config, doc line."""
    file = load_config(reference)
    missing = file.missing(overrides)
    config = file.resolve(overrides, complete=False)
    lines = [file.doc, "", f"Fields of job {file.job}, with the values of {file.label}:", ""]
    for name, kind, value, doc in field_docs(type(config), config):
        if name == "job":
            continue
        lines.append(f"  --config.{name}={'(required)' if name in missing else value}    {kind}")
        lines.append(f"      {doc}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:], resumable=True))
