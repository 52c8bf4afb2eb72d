"""What records a job reads: embedded ones or files, split into training and held-out ones."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

from llm_jax.base.errors import UserError
from llm_jax.data.config import DataConfig, EmbeddedConfig
from llm_jax.data.embedded import docstrings, problems, stdlib_text, stepwise
from llm_jax.data.embedded.problems import Problem
from llm_jax.data.examples import JUDGED as JUDGED_KINDS
from llm_jax.data.examples import PAIRED, UNPAIRED, Example, Kind, Text
from llm_jax.data.formats import read_examples
from llm_jax.data.holdout import held_out_below, place
from llm_jax.data.shares import check_mixture, source_names
from llm_jax.data.sources import Record, list_files, read_records, source_hashes
from llm_jax.data.templating import load_template
from llm_jax.storage.hashes import canonical_hash

FORMAT = 2  # changes whenever the same settings would give other records or rows
JUDGED = 2  # the same for pairs and unpaired answers only
STEPS = (("equations", False), ("answers", True))
"""The embedded steps' sources, whose accuracies are told apart: steps, and those that end their answers."""
Split = Literal["train", "eval"]
Located = tuple[str, Example]


def check(data: DataConfig) -> None:
    """Raises UserError for settings that contradict themselves, or paths that do not exist."""
    if data.window < 2:
        raise UserError(f"data.window is {data.window}: it has to be at least 2")
    if data.max_records is not None and data.max_records < 1:
        raise UserError(f"data.max_records is {data.max_records}: it has to be at least 1, or None")
    for name in ("path", "eval_path", "max_records"):
        if data.mixture and getattr(data, name) is not None:
            raise UserError(f"data.{name} is set, but data.mixture replaces it: each source has its own")
    if data.path is None:
        for name in ("eval_path", "max_records"):
            if getattr(data, name) is not None:
                raise UserError(f"data.{name} is set without data.path")
    if data.path is None and not data.mixture:
        if data.unpair:
            raise UserError("data.unpair=True is set without data.path: embedded answers are unpaired already")
        return problems.check(data.generated)
    if data.embedded != "problems":
        place = f"data.path={data.path}" if data.path is not None else "data.mixture"
        raise UserError(f"data.embedded={data.embedded} is set, but {place} replaces the embedded data")
    check_mixture(data.mixture)
    for number, one in enumerate(parts(data).values()):
        where = f"data.mixture[{number}]" if data.mixture else "data"
        if one.max_records is not None and one.max_records < 1:
            raise UserError(f"{where}.max_records is {one.max_records}: it has to be at least 1, or None")
        assert one.path is not None
        list_files(one.path)
        if one.eval_path is not None:
            list_files(one.eval_path)
        elif not 0 < one.eval_fraction < 1:
            raise UserError(
                f"data.eval_fraction is {one.eval_fraction}: it has to be between 0 and 1, or give eval_path"
            )


def parts(data: DataConfig) -> dict[str, DataConfig]:
    """The sources that are packed on their own, by name: a mixture's, or the data as they are (`records`)."""
    if not data.mixture:
        return {"records": data}
    return {
        name: dataclasses.replace(
            data, mixture=(), path=source.path, eval_path=source.eval_path, max_records=source.max_records
        )
        for name, source in zip(source_names(data.mixture), data.mixture, strict=True)
    }


def check_packing(kind: Kind, data: DataConfig) -> None:
    """Raises UserError for a packing that the kind of record does not have, or that would ignore another field."""
    judged, unpairs = kind in JUDGED_KINDS, kind in UNPAIRED or kind == "labelled"
    if data.embedded == "steps" and kind != "preference":
        raise UserError(f"data.embedded=steps are pairs of steps, no records of {kind}: preference trains on them")
    if data.packing == "concat_split" and judged:
        what = "pairs" if kind in PAIRED else "answers"
        job = "preference" if kind == "preference" or kind in UNPAIRED else "reward"
        raise UserError(f"data.packing=concat_split would cut {what} in two: {job} has best_fit and one_per_row")
    for name, read in (("unpair", unpairs), ("on_unusable", judged), ("share_prompts", kind in PAIRED)):
        default = next(f.default for f in dataclasses.fields(data) if f.name == name)
        if getattr(data, name) != default and not read:
            raise UserError(f"data.{name}={getattr(data, name)} is set, but no record of {kind} reads it")
    if data.random_prefix and kind != "pretrain":
        raise UserError(f"data.random_prefix is for pretrain: in {kind}, what comes before an answer is the prefix")
    if data.packing == "concat_split" and kind == "sft" and data.on_long != "error":
        raise UserError(
            f"data.on_long={data.on_long} has no effect with data.packing=concat_split: no record is too long"
        )


def source_manifest(kind: Kind, data: DataConfig) -> dict[str, Any]:
    """All that decides which records and windows there are, as JSON values: contents by hash, nothing by place or time.

    Raises:
      UserError: see `check`.
    """
    check(data)
    check_packing(kind, data)
    if data.mixture:
        weights = {name: source.weight for name, source in zip(source_names(data.mixture), data.mixture, strict=True)}
        return {"mixture": [[name, weights[name], source_manifest(kind, one)] for name, one in parts(data).items()]}
    manifest: dict[str, Any] = {"format": FORMAT, "kind": kind, "window": data.window, "packing": data.packing}
    if data.random_prefix:
        manifest["random_prefix"] = True
    if kind != "pretrain":
        manifest["on_long"] = data.on_long
        template = data.chat_template
        manifest["chat_template"] = None if template is None else canonical_hash(load_template(template))
    if kind in JUDGED_KINDS:
        manifest |= {"judged": JUDGED, "on_unusable": data.on_unusable}
    if data.share_prompts:
        manifest["share_prompts"] = True
    if kind in UNPAIRED or kind == "labelled":
        manifest["unpair"] = data.unpair
    if data.path is not None:
        manifest["files"] = source_hashes(data.path)
        manifest["max_records"] = data.max_records
        if data.eval_path is None:
            manifest["eval_fraction"] = data.eval_fraction
        else:
            manifest["eval_files"] = source_hashes(data.eval_path)
        return manifest
    manifest["generated"] = dataclasses.asdict(data.generated)
    if kind == "pretrain":
        manifest["versions"] = {"problems": problems.VERSION, "text": stdlib_text.content_hash()}
    elif data.embedded == "problems":
        manifest["versions"] = {"problems": problems.VERSION}
    elif data.embedded == "steps":
        manifest["versions"] = {"problems": problems.VERSION, "steps": stepwise.VERSION}
    else:
        manifest["versions"] = {"docstrings": docstrings.VERSION, "text": stdlib_text.content_hash()}
        if kind in PAIRED:
            manifest["sources"] = list(docstrings.KINDS)
    return manifest


Step = tuple[int, str, Example]
Reader = Callable[[int], Iterator[Step]]
"""From the number of the record to begin with: (number of the record, where it stands, an example of it) in order."""


def readers(kind: Kind, data: DataConfig, split: Split) -> dict[str, Reader]:
    """The examples of one side, by name of the source; not of a mixture, but of one of its `parts`.

    Raises:
      UserError: now or while reading; names the file and line of a record that cannot be used.
    """
    if data.path is None:
        return _embedded(kind, data, split)
    if data.eval_path is not None:
        path, limit = (data.path, data.max_records) if split == "train" else (data.eval_path, None)

        def whole(start: int) -> Iterator[Step]:
            return numbered_examples(kind, enumerate(read_records(path, limit, start), start), data.unpair)

        return {"records": whole}
    path, limit = data.path, data.max_records
    below = held_out_below(path, limit, data.eval_fraction)

    def read(start: int) -> Iterator[Step]:
        records = enumerate(read_records(path, limit, start), start)
        own = ((n, r) for n, r in records if (place(r.value) < below) == (split == "eval"))
        return numbered_examples(kind, own, data.unpair)

    return {"records": read}


def examples(kind: Kind, data: DataConfig, split: Split) -> dict[str, Iterator[Located]]:
    """The same without numbers, from the beginning, and of a mixture too, whose names those of its sources are."""
    return {
        part if data.mixture else name: ((where, example) for _, where, example in read(0))
        for part, one in parts(data).items()
        for name, read in readers(kind, one, split).items()
    }


def _embedded(kind: Kind, data: DataConfig, split: Split) -> dict[str, Reader]:
    config = data.generated
    if kind == "pretrain":
        sources: dict[str, Reader] = {}
        if config.text_fraction < 1:
            sources["problems"] = _numbered(kind, "embedded story", lambda: problems.stories(config, split))
        # The text comes last, since how much of it is read depends on how many tokens the stories have.
        if config.text_fraction > 0:
            sources["text"] = _numbered(kind, None, lambda: stdlib_text.documents(split))
        return sources
    if data.embedded == "steps":
        return {name: _numbered(kind, f"embedded {name}", partial(_steps, config, split, last)) for name, last in STEPS}
    if data.embedded == "docstrings" and kind in PAIRED:
        return {
            name: _numbered(kind, f"embedded {name}", partial(_docstrings, config, split, name))
            for name in docstrings.KINDS
        }
    task = problems if data.embedded == "problems" else docstrings
    if kind == "ranking":
        raise UserError("data.path is not set: there are no embedded rankings")
    if kind == "steps":
        if data.embedded != "problems":
            raise UserError(f"data.embedded={data.embedded} has no answers in steps")
        return {"problems": _numbered(kind, "embedded problems", lambda: problems.judged_steps(config, split))}
    make = task.demonstrations if kind == "sft" else task.preferences
    one_each = kind in UNPAIRED or kind == "labelled"
    records = (lambda: _one_answer_each(make(config, split))) if one_each else lambda: make(config, split)
    return {data.embedded: _numbered(kind, f"embedded {data.embedded}", records)}


def _steps(config: EmbeddedConfig, split: Split, last: bool) -> Iterator[dict[str, Any]]:
    return (record for record in stepwise.preferences(config, split) if record["chosen_ends"] == last)


def _docstrings(config: EmbeddedConfig, split: Split, kind: str) -> Iterator[dict[str, Any]]:
    return (record for record in docstrings.preferences(config, split) if record["kind"] == kind)


def _one_answer_each(pairs: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of every other pair the chosen answer, of the others the rejected one: unpaired data, half of it desirable."""
    for number, pair in enumerate(pairs):
        label = number % 2 == 0
        yield {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}


def _numbered(kind: Kind, name: str | None, make: Callable[[], Iterable[Any]]) -> Reader:
    """Generated records; documents where there is no name, which have names themselves."""

    def read(start: int) -> Iterator[Step]:
        if name is None:
            located = (Record(where, Text(text)) for where, text in make())
        else:
            located = (Record(f"{name} {number}", value) for number, value in enumerate(make()))
        return numbered_examples(kind, itertools.islice(enumerate(located), start, None))

    return read


def numbered_examples(kind: Kind, records: Iterable[tuple[int, Record]], unpair: bool = False) -> Iterator[Step]:
    """The examples of numbered records; `instances` are several of one record, and so are the answers of `unpair`."""
    for number, (where, value) in records:
        for example in read_examples(kind, value, where, unpair):
            yield number, where, example


def held_out_problems(data: DataConfig, count: int) -> list[Problem]:
    """Held-out word problems for exact match (`is_correct`) and manner (`is_careful`), any number of them."""
    problems.check(data.generated)
    return problems.problems(data.generated, "eval", count)
