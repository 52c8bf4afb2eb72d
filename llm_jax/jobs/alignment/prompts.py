"""What a policy is asked in a round: word problems, or records of a file, numbered once and for all.

| fields | content | answer | written |
|---|---|---|---|
| `prompt`, `answer`? (strings, or `prompt` as messages) | as it is | `answer` | |
| `prompt`, `completion` | as it is | | `completion` |
| `question`, `answer` (GSM8K) | one user's turn | behind `####` | all of it |
| `messages` that end in the assistant's turn | those before | | the last one |

What was written is taken to the letter, as SFT takes it: a model that learned from GSM8K writes the marks `<<48/2=24>>`
too (its wrong steps are found by them), and SPIN, which prefers what was written, must not prefer an answer for having
none.

Plain strings are continued as they are, as a preference job trains on them; messages go through the chat template.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_jax.base.errors import UserError
from llm_jax.data.config import DataConfig
from llm_jax.data.embedded import problems
from llm_jax.data.embedded.problems import Problem
from llm_jax.data.formats import refuse_unread
from llm_jax.data.holdout import held_out_below, place
from llm_jax.data.sources import read_records
from llm_jax.data.turns import Messages, read_messages
from llm_jax.jobs.config import RoundsConfig

FINAL = re.compile(r"####\s*(.+?)\s*$")


@dataclass(frozen=True)
class Prompt:
    """One thing to ask, and what is known of its answer."""

    number: int
    """Its place in the whole set of prompts, from 0: what seeds of samples are made from."""
    where: str
    """`file:line`, or the number of a word problem; for messages."""
    content: str | Messages
    answer: str | None = None
    """The right final answer, where one is known."""
    written: str | None = None
    """A whole answer that somebody wrote, where there is one (what SPIN prefers to the model's own)."""
    problem: Problem | None = None
    """The embedded word problem it is, where it is one."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All fields of the record, as scoring functions get them."""


def read_prompts(data: DataConfig, split: Literal["train", "eval"], count: int | None = None) -> list[Prompt]:
    """The first `count` prompts of one side (None: all there are) in order.

    Of embedded problems `data.generated.records` or `eval_records` are all there are; of records in `data.path` those
    held out are `data.eval_path`'s or, by hash, the share `data.eval_fraction`.

    Raises:
      UserError: a record cannot be used (file and line), or the data are no prompts.
    """
    if data.mixture:
        raise UserError("data.mixture is not read as prompts: give data.path")
    if data.path is None:
        return _embedded(data, split, count)
    path, limit, below = data.path, data.max_records, None
    if data.eval_path is not None:
        path, limit = (data.path, data.max_records) if split == "train" else (data.eval_path, None)
    else:
        below = held_out_below(data.path, data.max_records, data.eval_fraction)
    records = (
        record
        for record in read_records(path, limit)
        if below is None or (place(record.value) < below) == (split == "eval")
    )
    found = [_read(number, *record) for number, record in enumerate(itertools.islice(records, count))]
    if not found:
        raise UserError(f"{path} holds no prompt to {'train' if split == 'train' else 'evaluate'} on")
    return found


def _embedded(data: DataConfig, split: Literal["train", "eval"], count: int | None) -> list[Prompt]:
    if data.embedded != "problems":
        raise UserError(
            f"data.embedded={data.embedded} is not read as prompts: they are problems, or those of data.path"
        )
    problems.check(data.generated)
    most = data.generated.records if split == "train" else data.generated.eval_records
    made = problems.problems(data.generated, split, most if count is None else min(count, most))
    return [
        Prompt(i, f"problem {i}", _asked(p.prompt), str(p.answer), p.careful, p, {"answer": str(p.answer)})
        for i, p in enumerate(made)
    ]


def _read(number: int, where: str, record: Any) -> Prompt:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a prompt has to be a JSON object, not {type(record).__name__}")
    refuse_unread(record, where)
    for name in ("tools", "system"):
        if record.get(name):
            raise UserError(f"{where}: `{name}` is not read here: write it into the messages of `prompt`")
    if "question" in record and "answer" in record:
        question, answer = (_text(record, name, where) for name in ("question", "answer"))
        final = FINAL.search(answer)
        written = answer if final else None
        return Prompt(number, where, _asked(question), final[1] if final else answer, written, columns=record)
    if "prompt" in record:
        content = _content(record, "prompt", where)
        answer = _text(record, "answer", where) if record.get("answer") is not None else None
        written = _completion(record, where) if record.get("completion") is not None else None
        return Prompt(number, where, content, answer, written, columns=record)
    if "messages" in record:
        messages = read_messages(record["messages"], "messages", where)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: `messages` has to end in a turn of the assistant's, or be called `prompt`")
        return Prompt(number, where, messages[:-1], None, messages[-1]["content"], columns=record)
    raise UserError(f"{where}: a prompt needs `prompt`, `question` and `answer`, or `messages`")


def _asked(question: str) -> Messages:
    return ({"role": "user", "content": question},)


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and name == "answer":
        value = str(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: `{name}` has to be a string, and not empty")
    return value


def _content(record: Mapping[str, Any], name: str, where: str) -> str | Messages:
    if isinstance(record[name], str):
        return _text(record, name, where)
    messages = read_messages(record[name], name, where)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: `{name}` ends in a turn of the assistant's, so nothing is asked")
    return messages


def _completion(record: Mapping[str, Any], where: str) -> str:
    value = record["completion"]
    if isinstance(value, str):
        return _text(record, "completion", where)
    (turn,) = read_messages(value, "completion", where)[:1]
    return turn["content"]


def preference_record(prompt: Prompt, chosen: str, rejected: str, **columns: float) -> dict[str, Any]:
    """A pair of answers as a preference job reads it: strings to a string, turns of the assistant's to messages.

    `columns`: of the pair, `weight`, `chosen_score`, `rejected_score`.
    """
    if isinstance(prompt.content, str):
        return {"prompt": prompt.content, "chosen": chosen, "rejected": rejected, **columns}
    sides = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": list(map(dict, prompt.content)), **sides, **columns}


def step_record(
    prompt: Prompt, prefix: str, chosen: str, rejected: str, ends: tuple[bool, bool], **columns: float
) -> dict[str, Any]:
    """Two ways to take the next step of an answer (`data/stepwise.py`); `ends`: whether the answer is over after it."""
    record = {"chosen": chosen, "rejected": rejected, "chosen_ends": ends[0], "rejected_ends": ends[1], **columns}
    if isinstance(prompt.content, str):
        return {"prompt": prompt.content + prefix, **record}
    return {"prompt": list(map(dict, prompt.content)), "prefix": prefix, **record}


def training_prompts(config: RoundsConfig) -> list[Prompt]:
    """All that the rounds of a job will ask, each once. Raises UserError as `read_prompts`."""
    train, count = config.preference.train, config.prompts_per_round
    most = None if count is None else config.rounds * count
    if config.method == "online_dpo" and most is not None:
        most = max(most, train.steps * train.batch_size)
    return read_prompts(config.data, "train", most)


def share_of(prompts: Sequence[Prompt], number: int, count: int | None, rounds: int) -> list[Prompt]:
    """The prompts of round `number` (from 1): `count` of them, begun again at the end; None: its part of all, which are
    equal up to one."""
    if count is None and len(prompts) >= rounds:
        return list(prompts[len(prompts) * (number - 1) // rounds : len(prompts) * number // rounds])
    size = 1 if count is None else count
    first = (number - 1) * size
    return [prompts[(first + i) % len(prompts)] for i in range(min(size, len(prompts)))]
