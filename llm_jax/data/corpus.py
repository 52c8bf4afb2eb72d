"""What records a job reads: embedded ones or files, split into training and held-out ones, and checked."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from llm_jax.base.errors import UserError
from llm_jax.data.config import DataConfig
from llm_jax.data.embedded import docstrings, problems, stdlib_text
from llm_jax.data.embedded.problems import Problem
from llm_jax.data.formats import Completion, Conversation, Example, Kind, Messages, Text, read_examples
from llm_jax.data.sources import Record, list_files, read_records, source_hashes
from llm_jax.data.templating import assistant_spans, load_template, refuse_lost, render_marked
from llm_jax.data.turns import Tools
from llm_jax.storage.hashes import canonical_hash

FORMAT = 1  # changes whenever the same settings would give other records or rows
Split = Literal["train", "eval"]
Located = tuple[str, Example]

# Enough text for any vocabulary: merges hardly change beyond it.
BPE_CHARACTERS = 256_000_000
# Per character of stories in the embedded mixture, whose text would otherwise be read whole.
EMBEDDED_BPE_CHARACTERS = 4_000_000


def check(data: DataConfig) -> None:
    """Raises UserError for settings that contradict themselves, or paths that do not exist."""
    if data.window < 2:
        raise UserError(f"data.window is {data.window}: it has to be at least 2")
    if data.max_records is not None and data.max_records < 1:
        raise UserError(f"data.max_records is {data.max_records}: it has to be at least 1, or None")
    if data.path is None:
        for name in ("eval_path", "max_records"):
            if getattr(data, name) is not None:
                raise UserError(f"data.{name} is set without data.path")
        return problems.check(data.generated)
    if data.embedded != "problems":
        raise UserError(f"data.embedded={data.embedded} is set, but data.path={data.path} replaces the embedded data")
    list_files(data.path)
    if data.eval_path is not None:
        list_files(data.eval_path)
    elif not 0 < data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction is {data.eval_fraction}: it has to be between 0 and 1, or give eval_path")


def source_manifest(kind: Kind, data: DataConfig) -> dict[str, Any]:
    """All that decides which records and windows there are, as JSON values: contents by hash, nothing by place or time.

    Raises:
      UserError: see `check`.
    """
    check(data)
    manifest: dict[str, Any] = {"format": FORMAT, "kind": kind, "window": data.window}
    if kind != "pretrain":
        manifest["on_long"] = data.on_long
        template = data.chat_template
        manifest["chat_template"] = None if template is None else canonical_hash(load_template(template))
    if data.path is not None:
        manifest["files"] = _file_hashes(data.path)
        manifest["max_records"] = data.max_records
        if data.eval_path is None:
            manifest["eval_fraction"] = data.eval_fraction
        else:
            manifest["eval_files"] = _file_hashes(data.eval_path)
        return manifest
    manifest["generated"] = dataclasses.asdict(data.generated)
    if kind == "pretrain":
        manifest["versions"] = {"problems": problems.VERSION, "text": stdlib_text.content_hash()}
    elif data.embedded == "problems":
        manifest["versions"] = {"problems": problems.VERSION}
    else:
        manifest["versions"] = {"docstrings": docstrings.VERSION, "text": stdlib_text.content_hash()}
    return manifest


def _file_hashes(path: str) -> list[list[str]]:
    return source_hashes(path)


def examples(kind: Kind, data: DataConfig) -> dict[Split, dict[str, Iterator[Located]]]:
    """The examples of each side, by name of the source, each with where it stands.

    Raises:
      UserError: names the file and line of a record that cannot be used.
    """
    if data.path is not None:
        return {split: {"records": _read(kind, records)} for split, records in _split_files(data).items()}
    return {split: _embedded(kind, data, split) for split in ("train", "eval")}


def _embedded(kind: Kind, data: DataConfig, split: Split) -> dict[str, Iterator[Located]]:
    config = data.generated
    if kind == "pretrain":
        sources: dict[str, Iterator[Located]] = {}
        if config.text_fraction > 0:
            sources["text"] = ((name, Text(text)) for name, text in stdlib_text.documents(split))
        if config.text_fraction < 1:
            sources["problems"] = _located(kind, "embedded story", problems.stories(config, split))
        return sources
    task = problems if data.embedded == "problems" else docstrings
    records = task.demonstrations(config, split) if kind == "sft" else task.preferences(config, split)
    return {data.embedded: _located(kind, f"embedded {data.embedded}", records)}


def _located(kind: Kind, name: str, records: Iterable[dict]) -> Iterator[Located]:
    return _read(kind, (Record(f"{name} {number}", value) for number, value in enumerate(records)))


def _read(kind: Kind, records: Iterable[Record]) -> Iterator[Located]:
    for where, value in records:
        for example in read_examples(kind, value, where):
            yield where, example


def _split_files(data: DataConfig) -> dict[Split, list[Record]]:
    assert data.path is not None
    records = list(read_records(data.path, data.max_records))
    if data.eval_path is not None:
        return {"train": records, "eval": list(read_records(data.eval_path))}
    if len(records) < 2:
        raise UserError(f"{data.path} holds one record: nothing would be left to train on beside a held-out one")
    places = [_place(record.value) for record in records]
    held_out = {place for place in places if place < data.eval_fraction}
    if not held_out or len(held_out) == len(set(places)):  # few records: the lowest alone
        held_out = {min(places)}
    sides: dict[Split, list[Record]] = {"train": [], "eval": []}
    for place, record in zip(places, records, strict=True):
        sides["eval" if place in held_out else "train"].append(record)
    if not sides["train"]:
        raise UserError(f"{data.path} holds the same record {len(records)} times: nothing can be held out")
    return sides


def _place(value: Any) -> float:
    """A number in [0, 1) by the record's content, so that equal records are on one side, wherever they stand."""
    text = value.text if isinstance(value, Text) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def pretrain_texts(data: DataConfig) -> Iterator[str]:
    """The training texts that a tokenizer is trained on; never a held-out one."""
    limit = BPE_CHARACTERS if data.path is not None else EMBEDDED_BPE_CHARACTERS
    for source in examples("pretrain", data)["train"].values():
        left = limit
        for _, example in source:
            if left > 0 and isinstance(example, Text):
                left -= len(example.text)
                yield example.text


def held_out_problems(data: DataConfig, count: int) -> list[Problem]:
    """Held-out word problems for exact match (`is_correct`) and manner (`is_careful`), any number of them."""
    problems.check(data.generated)
    return problems.problems(data.generated, "eval", count)


def check_records(kind: Kind, data: DataConfig) -> None:
    """Reads every record of local data, and renders it where the template is known without a checkpoint.

    Raises:
      UserError: names the file and line of the first record that cannot be used.
    """
    check(data)
    template = None if data.chat_template is None or kind == "pretrain" else load_template(data.chat_template)
    if data.path is None:
        if template is not None:
            _check_rendering(template, *next(iter(examples(kind, data)["train"][data.embedded])))
        return
    for sources in examples(kind, data).values():
        for located in sources["records"]:
            if template is not None:
                _check_rendering(template, *located)


def _check_rendering(template: str, where: str, example: Example) -> None:
    # Any names will do: what is checked is whether the template takes the messages and shows the answers.
    variables = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    try:
        if isinstance(example, Conversation):
            specials = tuple(variables.values())
            assistant_spans(template, example.messages, variables, specials, example.tools, example.learned)
            return
        for prompt, answer, tools in _turns(example):
            refuse_lost(template, (*prompt, *answer), variables, tools)
            opened, _ = render_marked(template, prompt, variables, add_generation_prompt=True, tools=tools)
            whole, _ = render_marked(template, (*prompt, *answer), variables, tools=tools)
            if opened.startswith(whole):
                raise UserError("chat template: it leaves out the assistant's answer (an all-zero loss mask)")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _turns(example: Example) -> list[tuple[Messages, Messages, Tools]]:
    if isinstance(example, Text | Conversation) or isinstance(example.prompt, str):
        return []
    answers = (example.completion,) if isinstance(example, Completion) else (example.chosen, example.rejected)
    return [(example.prompt, answer, example.tools) for answer in answers]  # pyright: ignore[reportReturnType]
