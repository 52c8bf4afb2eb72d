"""What reward models learn from beside pairs: texts with a class, rankings, and answers judged step by step.

| kind | fields | examples |
|---|---|---|
| `labelled` | `label` (a number from 0) beside `text`, `messages`, or any prompt with its answer | Labelled |
| `labelled` with `data.unpair` | a pair: the chosen answer is of class 1, the rejected one of class 0 | two Labelled |
| `ranking` | `prompt`, `completions` (best first, or with `ranks`, 1 the best, or `scores`) | Ranking |
| `steps` | `prompt`, `completions` (the steps), `labels` (one each; TRL's stepwise supervision) | Steps |
| `compared` | as `preference` | Pair, which is read as two answers behind one another |
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_jax.base.errors import UserError
from llm_jax.data.turns import Messages, Tools

if TYPE_CHECKING:
    from llm_jax.data.examples import Completion, Conversation, Text

KINDS = ("labelled", "ranking", "steps")
WANTED = {
    "labelled": "`text`+`label`, or `label` beside messages or a prompt with its answer",
    "ranking": "`prompt`+`completions`, the best first (or with `ranks` or `scores`)",
    "steps": "`prompt`+`completions`+`labels`, as many labels as completions",
}
BEHIND = "\n\n---\n\n"
"""Between two answers, strings, that are compared."""
ANOTHER = "Now another answer to the same, to compare."
"""What the user says between two answers, messages, that are compared."""


@dataclass(frozen=True)
class Labelled:
    """A text of a class."""

    example: "Text | Completion | Conversation"
    label: int


@dataclass(frozen=True)
class Ranking:
    """Two or more different answers to one prompt, all strings or all messages, the best first."""

    prompt: str | Messages
    answers: tuple[str | Messages, ...]
    tools: Tools = ()


@dataclass(frozen=True)
class Steps:
    """An answer to a prompt in steps, and the class of each: 0 and 1 for wrong and right."""

    prompt: str | Messages
    steps: tuple[str, ...]
    labels: tuple[int, ...]
    tools: Tools = ()


def behind(first: str | Messages, second: str | Messages) -> str | Messages:
    """Two answers as one, for a model that compares them: the second behind the first."""
    if isinstance(first, str) or isinstance(second, str):
        return f"{first}{BEHIND}{second}"
    return (*first, {"role": "user", "content": ANOTHER}, *second)


def read_label(value: Any, name: str, where: str) -> int:
    """A class by number. Raises UserError for anything else."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or value < 0:
        raise UserError(f"{where}: `{name}` is {value!r}; it has to be the number of a class, from 0")
    return int(value)


def read_steps(record: dict[str, Any], prompt: str | Messages, tools: Tools, where: str) -> Steps:
    """Raises UserError where steps and labels don't match."""
    steps, labels = _texts(record, "completions", where, least=1), record.get("labels")
    if not isinstance(labels, list) or len(labels) != len(steps):
        count = f"{len(labels)} of them" if isinstance(labels, list) else repr(labels)
        raise UserError(f"{where}: `labels` has to be a list of {len(steps)}, one for each step, not {count}")
    read = tuple(read_label(value, f"labels[{i}]", where) for i, value in enumerate(labels))
    return Steps(prompt, steps, read, tools)


def read_ranking(record: dict[str, Any], prompt: str | Messages, tools: Tools, where: str) -> Ranking:
    """Raises UserError for a single answer, for equal answers, and for ties of `ranks` or `scores`."""
    if "labels" in record:
        raise UserError(f"{where}: `labels` of steps are no ranking (task=steps learns them)")
    answers, given = _texts(record, "completions", where, least=2), [n for n in ("ranks", "scores") if n in record]
    if len(given) > 1:
        raise UserError(f"{where}: `ranks` and `scores` are two orders: leave one of them out")
    if given:
        order = _numbers(record[given[0]], given[0], len(answers), where)
        if len(set(order)) < len(order):
            raise UserError(f"{where}: `{given[0]}` has ties, {order}: a ranking has to say which answer is better")
        sign = 1 if given[0] == "ranks" else -1
        answers = tuple(answers[i] for i in sorted(range(len(order)), key=lambda i: sign * order[i]))
    if len(set(answers)) < len(answers):
        raise UserError(f"{where}: two of `completions` are equal, and a ranking puts one above the other")
    if isinstance(prompt, str):
        return Ranking(prompt, answers, tools)
    return Ranking(prompt, tuple(({"role": "assistant", "content": text},) for text in answers), tools)


def _texts(record: dict[str, Any], name: str, where: str, least: int) -> tuple[str, ...]:
    values = record.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: `{name}` has to be a list of strings")
    if len(values) < least:
        what = "a ranking of one answer says nothing" if least == 2 and values else "it is empty"
        raise UserError(f"{where}: `{name}` has to have {least} or more entries: {what}")
    for index, value in enumerate(values):
        if not value.strip():
            raise UserError(f"{where}: `{name}[{index}]` is empty")
    return tuple(values)


def _numbers(values: Any, name: str, count: int, where: str) -> list[float]:
    good = isinstance(values, list) and len(values) == count
    if not good or not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise UserError(f"{where}: `{name}` has to be a list of {count} numbers, one for each of `completions`")
    return values
