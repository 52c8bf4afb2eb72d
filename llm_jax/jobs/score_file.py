"""Scores for a file of answers: each record again, with what the model says of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llm_jax.adapters.loading import load_merged
from llm_jax.base.errors import UserError
from llm_jax.data.examples import Pair
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import read_records
from llm_jax.jobs.answer_scores import compare, score, step_scores
from llm_jax.models.families.heads import PAIRWISE
from llm_jax.models.loading import Model
from llm_jax.storage.atomic import write_atomically

SIDES = ("chosen", "rejected")
LISTS = ("prompt", "completions")
"""Fields that may hold messages, or have to hold steps."""


def score_file(models: Sequence[str], source: str, target: str, batch_size: int) -> int:
    """Writes `target`, JSON lines, and returns how many there are.

    | model | records | field |
    |---|---|---|
    | reward model | `prompt`, `completion` | `score`; of an ensemble `score` (the mean) and `score_std` |
    | reward model | `prompt`, `chosen`, `rejected` | `chosen_score`, `rejected_score` (that `preference` reads) |
    | classifier | `prompt`, `completion`, or `text` | `scores`, by class (of an ensemble the mean) |
    | preference model | `prompt`, `chosen`, `rejected` | `preference`: P(chosen is better) |
    | process reward model | `prompt`, `completions` | `step_scores`, by step and class |

    Pairs are read as in training, so that a `prompt` may be what both sides begin with.

    Raises UserError, naming file and line, for a record without the model's fields; then nothing is written.
    """
    records = [(where, value) for where, value in read_records(source, None)]
    opened = [load_merged(path) for path in models]
    if not records:
        raise UserError(f"--input {source}: there is no record")
    lines = [{**record, **said} for (_, record), said in zip(records, _said(opened, records, batch_size), strict=True)]
    write_atomically(epath.Path(target), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(lines)


def _said(models: Sequence[Model], records: Sequence[tuple[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    first = models[0]
    if first.config.head.pooling == "none" and first.config.head.labels is not None:
        _alone(models, "process reward model")
        prompts, steps = _columns(records, ("prompt", "completions"))
        return [{"step_scores": s.tolist()} for s in step_scores(first, prompts, steps, batch_size=batch_size)]
    if first.extra.get(PAIRWISE):
        _alone(models, "preference model")
        found = compare(first, *_pairs(records), batch_size=batch_size)
        return [{"preference": p} for p in found.tolist()]
    if all(isinstance(record, Mapping) and set(SIDES) <= record.keys() for _, record in records):
        prompts, *sides = _pairs(records)
        scores = [score(models, prompts, side, batch_size=batch_size) for side in sides]
        if scores[0].ndim != 2:
            raise UserError("chosen and rejected have one score each, and the model has classes")
        both = zip(*(s.mean(0).tolist() for s in scores), strict=True)
        return [{"chosen_score": chosen, "rejected_score": rejected} for chosen, rejected in both]
    texts = all(isinstance(record, Mapping) and "text" in record for _, record in records)
    columns = ([""] * len(records), *_columns(records, ("text",))) if texts else None
    prompts, answers = columns or _columns(records, ("prompt", "completion"))
    scores = score(models, prompts, answers, batch_size=batch_size)
    if scores.ndim == 3:
        return [{"scores": one} for one in scores.mean(0).tolist()]
    spread = zip(scores.mean(0).tolist(), scores.std(0).tolist(), strict=True)
    return [{"score": mean} | ({"score_std": std} if len(models) > 1 else {}) for mean, std in spread]


def _alone(models: Sequence[Model], what: str) -> None:
    if len(models) > 1:
        raise UserError(f"a {what} is read alone, and {len(models)} models are given")


def _pairs(records: Sequence[tuple[str, Any]]) -> list[list[Any]]:
    """Prompts, chosen and rejected answers, read as training reads them."""
    return _columns([(where, _read_pair(where, record)) for where, record in records], ("prompt", *SIDES))


def _read_pair(where: str, record: Any) -> dict[str, Any]:
    pair = next(iter(read_examples("preference", record, where)), None)
    if not isinstance(pair, Pair):
        raise UserError(f"{where}: pairs of steps have no score of a whole answer")
    sides = {name: getattr(pair, name) for name in ("prompt", *SIDES)}
    return {name: value if isinstance(value, str) else list(value) for name, value in sides.items()}


def _columns(records: Sequence[tuple[str, Any]], names: Sequence[str]) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in names]
    for where, record in records:
        for name, column in zip(names, found, strict=True):
            value = record.get(name) if isinstance(record, Mapping) else None
            if name not in LISTS and isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
                value = value[0].get("content")  # the assistant's one message
            texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
            messages = isinstance(value, list) and all(isinstance(v, Mapping) for v in value)
            if not (messages if name == "prompt" else texts and name == "completions") and not isinstance(value, str):
                raise UserError(f"{where}: the model reads `{'`, `'.join(names)}`, and `{name}` is {value!r}")
            column.append(value)
    return found
