"""Which fields of a configuration make another run, and which may change while one is under way."""

from collections.abc import Container, Mapping
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.storage.workdir import Workdir, is_workdir

# How a run is spread, watched and saved: no number of its result depends on it.
NOT_HASHED = (
    "mesh.",
    "logging.",
    "profile.",
    "data.cache_dir",
    "train.log_every",
    "train.checkpoint.every",
    "train.checkpoint.keep_last",
    "train.checkpoint.keep_best",
    "train.checkpoint.best_metric",
)
# What may change besides under an explicit workdir, whose run then goes on; so may `train.steps`, upwards.
MAY_CHANGE = (
    *NOT_HASHED,
    "train.checkpoint.export",
    "train.eval_every",
    "train.eval_batches",
    # So that a run that a checker ended after hours goes on without the prompts that it can't judge.
    "scorer.timeout",
    "scorer.on_error",
)


def hashed_fields(config: Mapping[str, Any], references: Container[str]) -> dict[str, Any]:
    """The fields of a resolved configuration that the run's hash covers, by dotted name.

    References are left out: the hash covers what they lead to, however it is spelled.
    """
    return {
        field: value
        for field, value in _by_dots(config).items()
        if not field.startswith(NOT_HASHED) and field not in references
    }


def refuse_changes(workdir: Workdir, record: Mapping[str, Any]) -> None:
    """Raises UserError if a workdir was made with another configuration than `record` (`config.json`) says.

    The error lists the fields. A folder that is not a workdir is refused unless it is empty.
    """
    if not is_workdir(workdir.path):
        if workdir.path.exists() and not workdir.path.is_dir():
            raise UserError(f"workdir {workdir} is a file")
        # A lock, and a config.json that was never finished, are what a run leaves that was killed at its very start.
        started = {"lock", "config.json.new"}
        if workdir.path.exists() and any(p.name not in started for p in workdir.path.iterdir()):
            raise UserError(f"workdir {workdir} is neither empty nor the workdir of a run")
        return
    before = workdir.read_config()
    changes = [f"job: {before['job']} -> {record['job']}"] if before["job"] != record["job"] else []
    old, new = _by_dots(before["config"]), _by_dots(record["config"])
    references = {*before["parents"], *record["parents"]}
    for field in sorted(old.keys() | new.keys()):
        was, now = old.get(field), new.get(field)
        if was == now or field.startswith(MAY_CHANGE) or field in references:
            continue
        if field == "train.steps" and was is not None and now is not None and now > was:
            continue
        changes.append(f"{field}: {was} -> {now}")
    for field in sorted(references):
        was, now = before["parents"].get(field), record["parents"].get(field)
        if (was and was["hash"]) != (now and now["hash"]):
            changes.append(f"{field}: {was and was['path']} -> {now and now['path']}")
    if before["sources"] != record["sources"]:
        changes.append("the content of the data")
    if changes:
        raise UserError(f"workdir {workdir} was made with another configuration; changed: {', '.join(changes)}")


def _by_dots(config: Mapping[str, Any]) -> dict[str, Any]:
    return {path.replace("/", "."): value for path, value in flatten(config).items()}
