"""From a data configuration to rows on disk: encoded, fitted, packed, written once, reused while nothing changed."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.chat import with_template
from llm_jax.data.config import DataConfig
from llm_jax.data.corpus import (
    Located,
    Split,
    check_records,
    examples,
    held_out_problems,
    pretrain_texts,
    source_manifest,
)
from llm_jax.data.encode import Encoded, Sequence, encode_examples
from llm_jax.data.fitting import Counts, fit, split
from llm_jax.data.formats import Kind
from llm_jax.data.packing import best_fit_decreasing
from llm_jax.data.rows import Row, Schema, fill_pair_row, fill_row, lm_schema, pair_schema
from llm_jax.data.rowset import RowSet, write_rowset
from llm_jax.data.sources import ignored_files
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.storage.atomic import write_atomically

__all__ = [
    "Prepared",
    "check_lengths",
    "check_records",
    "held_out_problems",
    "prepare",
    "pretrain_texts",
    "source_manifest",
]

MANIFEST = "manifest.json"
EMBEDDED_CHECKED = 512
Items = list[tuple[Sequence, ...]]


class Prepared(NamedTuple):
    """Rows to train and to evaluate on; counts; the tokenizer they were made with, its chat template included."""

    train: RowSet
    eval: RowSet
    summary: dict[str, Any]
    tokenizer: Tokenizer


class _Source(NamedTuple):
    """A source's fitted items and which of them share each window."""

    name: str
    items: Items
    windows: list[list[int]]
    counts: Counts


def prepare(
    kind: Kind, data: DataConfig, tokenizer: Tokenizer, folder: str | os.PathLike[str], seed: int = 0
) -> Prepared:
    """Makes the rows of a job under `folder/train` and `folder/eval`, or finds them there.

    Args:
      kind: pretrain, sft or preference.
      data: where records come from and how long a window is.
      tokenizer: for conversations, given the template that `data.chat_template` names.
      folder: finished when it has a `manifest.json`, which is written last.
      seed: of the order of rows.

    Raises:
      UserError: a record cannot be used (file and line), or the folder holds rows made from something else.
    """
    folder = epath.Path(folder)
    if kind != "pretrain":
        tokenizer = with_template(tokenizer, data.chat_template)
    inputs = {**source_manifest(kind, data), "tokenizer": tokenizer.fingerprint, "seed": seed}
    if (folder / MANIFEST).exists():
        summary = _reuse(folder, inputs)
    else:
        summary = _build(kind, data, tokenizer, folder, seed)
        stored = {"inputs": inputs, "summary": summary}
        write_atomically(folder / MANIFEST, json.dumps(stored, indent=2) + "\n")
    return Prepared(RowSet(folder / "train"), RowSet(folder / "eval"), summary, tokenizer)


def _reuse(folder: epath.Path, inputs: dict[str, Any]) -> dict[str, Any]:
    stored = json.loads((folder / MANIFEST).read_text())
    found = stored["inputs"]
    changed = [
        name for name in sorted({*found, *inputs}) if found.get(name) != json.loads(json.dumps(inputs.get(name)))
    ]
    if changed:
        raise UserError(f"{folder} holds rows made with another {', '.join(changed)}: take another folder or remove it")
    return stored["summary"]


def check_lengths(kind: Kind, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Encodes every record of local data, for a tokenizer that is known before anything is trained.

    Of embedded data, which are all of a kind, it takes the first few.

    Raises:
      UserError: the first record that the template refuses or that is too long for the window.
    """
    if kind == "pretrain":
        return
    tokenizer = with_template(tokenizer, data.chat_template)
    for sources in examples(kind, data).values():
        for located in sources.values():
            checked = itertools.islice(located, EMBEDDED_CHECKED) if data.path is None else located
            for _ in fit(encode_examples(kind, checked, tokenizer), data.window, data.on_long, Counts()):
                pass


def _build(kind: Kind, data: DataConfig, tokenizer: Tokenizer, folder: epath.Path, seed: int) -> dict[str, Any]:
    sides = {side: _pack(kind, data, tokenizer, side, sources) for side, sources in examples(kind, data).items()}
    most = max(len(window) for sources in sides.values() for source in sources for window in source.windows)
    schema = pair_schema(data.window, most) if kind == "preference" else lm_schema(data.window)
    summary: dict[str, Any] = {"kind": kind, "window": data.window, "vocab_size": tokenizer.vocab_size}
    if ignored := [file for path in (data.path, data.eval_path) if path for file in ignored_files(path)]:
        summary["ignored_files"] = ignored
    for side, sources in sides.items():
        totals = {source.name: _Totals(source.counts) for source in sources}
        manifest = {
            "kind": kind,
            "window": data.window,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "sources": [source.name for source in sources],
        }
        write_rowset(folder / side, _rows(sources, schema, tokenizer, seed, totals), schema, manifest)
        summary[side] = _summarise(totals, data.window)
    return summary


def _pack(
    kind: Kind, data: DataConfig, tokenizer: Tokenizer, side: Split, sources: dict[str, Iterator[Located]]
) -> list[_Source]:
    packed: list[_Source] = []
    # The embedded text comes last, since how much of it is read depends on how many tokens the stories have.
    for name in sorted(sources, key=lambda n: n == "text"):
        counts = Counts()
        encoded = encode_examples(kind, sources[name], tokenizer)
        if kind == "pretrain":
            if data.path is None and name == "text":
                encoded = _up_to(encoded, _text_tokens(data, side, packed))
            items = list(split(encoded, data.window, counts))
        else:
            items = list(fit(encoded, data.window, data.on_long, counts))
        if not items:
            raise UserError(f"no {side} record of {data.path or name} is left for data.window {data.window}")
        lengths = [sum(len(sequence.ids) for sequence in item) for item in items]
        packed.append(_Source(name, items, best_fit_decreasing(lengths, data.window), counts))
    return packed


def _text_tokens(data: DataConfig, side: Split, packed: list[_Source]) -> float:
    """How many tokens of text go with the stories packed so far."""
    if side == "eval":
        return data.generated.eval_records * data.window
    if not packed:
        return float("inf")
    share = data.generated.text_fraction
    return packed[0].counts.tokens_read * share / (1 - share)


def _up_to(encoded: Iterator[Encoded], tokens: float) -> Iterator[Encoded]:
    """Whole documents until they hold at least so many tokens."""
    for example in encoded:
        yield example
        tokens -= sum(len(sequence.ids) for sequence in example.sequences)
        if tokens <= 0:
            return


@dataclasses.dataclass
class _Totals:
    """What the rows of one source hold."""

    counts: Counts
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    target_bytes: int = 0

    def add(self, row: Row) -> None:
        self.rows += 1
        self.tokens += int((row["segment_ids"] > 0).sum())
        self.targets += int(row["loss_mask"].sum())
        self.target_bytes += int(row["num_bytes"])


def _rows(
    sources: list[_Source], schema: Schema, tokenizer: Tokenizer, seed: int, totals: dict[str, _Totals]
) -> Iterator[Row]:
    """Every window of every source as a row, in shuffled order, so that any run of rows is a sample of all."""
    placed = [(number, window) for number, source in enumerate(sources) for window in source.windows]
    firsts = np.cumsum([0, *(len(source.items) for source in sources)]).tolist()
    for index in np.random.default_rng(seed).permutation(len(placed)).tolist():
        number, window = placed[index]
        source = sources[number]
        if "pair_index" in schema:
            pairs = [(firsts[number] + i, *source.items[i]) for i in window]
            row = fill_pair_row(schema, pairs, tokenizer.token_bytes, tokenizer.pad_id, number)
        else:
            segments = [source.items[i][0] for i in window]
            row = fill_row(schema, segments, tokenizer.token_bytes, tokenizer.pad_id, number)
        totals[source.name].add(row)
        yield row


def _summarise(totals: dict[str, _Totals], window: int) -> dict[str, Any]:
    by_source = {}
    for name, total in totals.items():
        numbers = dataclasses.asdict(total)
        by_source[name] = {**numbers.pop("counts"), **numbers}
    summed = {field: sum(numbers[field] for numbers in by_source.values()) for field in next(iter(by_source.values()))}
    padding = 1 - summed["tokens"] / (summed["rows"] * window)
    return {**summed, "padding_share": round(padding, 6), "sources": by_source}
