"""From a data configuration to rows on disk: encoded, fitted, packed, written once, reused while nothing changed."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.build import Totals, build_side
from llm_jax.data.chat import with_template
from llm_jax.data.config import DataConfig
from llm_jax.data.corpus import Split, parts, readers, source_manifest
from llm_jax.data.examples import PAIRED, Kind
from llm_jax.data.mixture import MixedRows
from llm_jax.data.rowset import RowSet
from llm_jax.data.shares import Shares
from llm_jax.data.sources import ignored_files
from llm_jax.data.store import obtain, summary_of
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.remote import is_remote

MANIFEST = "manifest.json"


class Prepared(NamedTuple):
    """Rows to train and to evaluate on; counts; the tokenizer they were made with, its chat template included."""

    train: RowSet
    eval: RowSet
    summary: dict[str, Any]
    tokenizer: Tokenizer


def prepare(
    kind: Kind,
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    store: str | os.PathLike[str] | None = None,
) -> Prepared:
    """Makes the rows of a job, or finds them.

    Args:
      kind: pretrain, sft or preference.
      data: where records come from and how long a window is.
      tokenizer: for conversations, given the template that `data.chat_template` names.
      folder: of the run; gets a `manifest.json` that says what the rows are made from and where they lie.
      store: where packed sets are kept, each source's under its hash, for all runs that use it; None means `folder`.

    Raises:
      UserError: a record cannot be used (file and line), or the folder is of rows made from something else.
    """
    folder = epath.Path(folder)
    store = folder if store is None else epath.Path(store)
    if kind != "pretrain":
        tokenizer = with_template(tokenizer, data.chat_template)
    inputs = {**source_manifest(kind, data), "tokenizer": tokenizer.fingerprint}
    if (folder / MANIFEST).exists():
        _refuse_changes(folder, inputs)
    folders = {name: _packed(kind, one, tokenizer, store) for name, one in parts(data).items()}
    stored = {
        "inputs": inputs,
        "sets": {name: _relative(path, folder) for name, path in folders.items()},
        "weights": [source.weight for source in data.mixture],
    }
    text = json.dumps(stored, indent=2) + "\n"
    if not (folder / MANIFEST).exists() or (folder / MANIFEST).read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / MANIFEST, text)
    rows = {split: open_rows(folder, split) for split in ("train", "eval")}
    return Prepared(rows["train"], rows["eval"], _summary(data, folders), tokenizer)


def open_rows(folder: str | os.PathLike[str], split: Split) -> RowSet:
    """The rows of one side that `prepare` made for the run whose folder this is.

    Raises:
      UserError: they are not there (any more).
    """
    folder = epath.Path(folder)
    stored = json.loads((folder / MANIFEST).read_text())
    sets = {name: RowSet(folder / path / split) for name, path in stored["sets"].items()}
    if not stored["weights"]:
        return next(iter(sets.values()))
    return MixedRows(sets, dict(zip(sets, stored["weights"], strict=True)), in_turn=split == "eval")


def _relative(path: epath.Path, folder: epath.Path) -> str:
    """So that runs and the sets beside them can be moved together."""
    return str(path) if is_remote(folder) else os.path.relpath(path, folder)


def _refuse_changes(folder: epath.Path, inputs: Mapping[str, Any]) -> None:
    found = json.loads((folder / MANIFEST).read_text())["inputs"]
    changed = [
        name for name in sorted({*found, *inputs}) if found.get(name) != json.loads(json.dumps(inputs.get(name)))
    ]
    if changed:
        raise UserError(f"{folder} holds rows made with another {', '.join(changed)}: take another folder or remove it")


def _packed(kind: Kind, data: DataConfig, tokenizer: Tokenizer, store: epath.Path) -> epath.Path:
    """The folder of one source's packed set."""
    inputs = {**source_manifest(kind, data), "tokenizer": tokenizer.fingerprint}

    def build(folder: epath.Path) -> dict[str, Any]:
        # The smaller side first: it tells how many records there are.
        held_out = _side(kind, data, tokenizer, folder, "eval")
        records = held_out.manifest["records"] if data.path is not None and data.eval_path is None else None
        train = _side(kind, data, tokenizer, folder, "train", records)
        return {side: rows.manifest["totals"] for side, rows in (("train", train), ("eval", held_out))}

    return obtain(store, inputs, build)


def _side(
    kind: Kind, data: DataConfig, tokenizer: Tokenizer, folder: epath.Path, split: Split, records: int | None = None
) -> RowSet:
    def budget(name: str, totals: Mapping[str, Totals]) -> float:
        """How much of the embedded text goes with the stories."""
        if kind != "pretrain" or data.path is not None or name != "text":
            return float("inf")
        if split == "eval":
            return data.generated.eval_records * data.window
        if "problems" not in totals:
            return float("inf")
        share = data.generated.text_fraction
        return totals["problems"].counts.tokens_read * share / (1 - share)

    rows = build_side(folder / split, kind, data, tokenizer, readers(kind, data, split), budget, records)
    # Of a few generated pairs one kind may have none.
    generated = kind in PAIRED and data.path is None and len(rows) > 0
    for name, total in rows.manifest["totals"].items():
        if not total["rows"] and not generated:
            left_out = {"too long": "dropped", "with equal answers": "identical", "with an empty answer": "blank"}
            why = ", ".join(f"{total[count]} {what}" for what, count in left_out.items() if total[count])
            raise UserError(
                f"no {split} record of {data.path or name} is left for data.window {data.window}"
                + (f": {why}" if why else "")
            )
    return rows


def _summary(data: DataConfig, folders: Mapping[str, epath.Path]) -> dict[str, Any]:
    summaries = {name: summary_of(path) for name, path in folders.items()}
    rows = RowSet(next(iter(folders.values())) / "train")
    summary: dict[str, Any] = {
        "kind": rows.manifest["kind"],
        "window": rows.manifest["window"],
        "vocab_size": rows.manifest["vocab_size"],
    }
    paths = [path for one in parts(data).values() for path in (one.path, one.eval_path) if path]
    if ignored := [file for path in paths for file in ignored_files(path)]:
        summary["ignored_files"] = ignored
    shares = Shares([source.weight for source in data.mixture]).shares if data.mixture else []
    for side in ("train", "eval"):
        by_source: dict[str, dict[str, Any]] = {}
        for number, (part, found) in enumerate(summaries.items()):
            for name, totals in found[side].items():
                by_source[part if data.mixture else name] = dict(totals)
                if data.mixture:
                    by_source[part]["share"] = round(float(shares[number]), 6)
        summary[side] = _summed(by_source.values(), data.window) | {"sources": by_source}
    return summary


def _summed(sources: Iterable[Mapping[str, int]], window: int) -> dict[str, Any]:
    sources = list(sources)
    summed: dict[str, Any] = {n: sum(source[n] for source in sources) for n in sources[0] if n != "share"}
    padding = 1 - summed["tokens"] / (summed["rows"] * window)
    return {**summed, "padding_share": round(padding, 6)}
