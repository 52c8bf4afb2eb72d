"""Records of answers in steps: pairs that are one step apart, and solutions marked right or wrong.

| fields | format | examples |
|---|---|---|
| `prompt`, `initial_reason_steps`, `chosen`, `rejected` | Step-DPO's published set | StepPair |
| the same with `prefix` for `initial_reason_steps` | what its generator writes | StepPair |
| `prompt`, `chosen`, `rejected`, and `chosen_ends`, `rejected_ends` or both | ours | StepPair |
| `question`, and objects with `solution` and `is_correct` | GSM8K's model solutions | StepPair, right over wrong |

A `prompt` that is a string is a question where a prefix stands beside it, as in the published set, whose authors put it
into the user's turn of a template of their own; without a prefix it is continued as it is, as in every pair of strings.
`prefix`, `chosen` and `rejected` may be lists of steps, which are joined; of lists in `chosen` and `rejected` without a
prefix, which are whole answers, the steps they share are the prefix, and the first in which they differ is the pair.

Step-DPO (Lai et al. 2024, arXiv:2406.18629) is DPO on such pairs: its `tokenize_row` puts no end token behind any
answer. Here a step that is said to end its answer (`chosen_ends`, `rejected_ends`: true) has one; none is said to in
the published set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.data.steps import shared_steps, split_steps
from llm_jax.data.turns import Messages, Tools, read_messages, refuse_flags

PREFIXES = ("initial_reason_steps", "prefix")
ENDS = ("chosen_ends", "rejected_ends")


@dataclass(frozen=True)
class StepPair:
    """Two ways to take the next step of an answer. Only the steps' tokens are targets; the prefix is context."""

    prompt: str | Messages
    prefix: str
    """The answer's correct beginning, maybe empty."""
    chosen: str
    rejected: str
    ends: tuple[bool, bool] = (False, False)
    """Whether the answer is over after the chosen, after the rejected step."""
    tools: Tools = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


def is_step_pair(record: Mapping[str, Any]) -> bool:
    """Whether a preference record is of steps."""
    sides = [record.get(side) for side in ("chosen", "rejected")]
    listed = any(isinstance(side, list) and side and isinstance(side[0], str) for side in sides)
    return listed or bool({*PREFIXES, *ENDS} & record.keys())


def marked_solutions(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The fields of a record that are marked solutions."""
    return {n: v for n, v in record.items() if isinstance(v, dict) and {"solution", "is_correct"} <= v.keys()}


def read_step_pair(
    record: Mapping[str, Any], where: str, tools: Tools, led: Callable[[Messages], Messages], numbers: dict[str, float]
) -> StepPair:
    """A pair of steps; `led` puts the record's system text before messages, `numbers` are the record's own.

    Raises:
      UserError: a field is missing or of another type, or nothing is left to choose between.
    """
    names = [name for name in PREFIXES if name in record]
    if len(names) > 1:
        raise UserError(f"{where}: `{names[0]}` and `{names[1]}` are two names of the same: give one")
    prefix = _joined(record, names[0], where, empty=True) if names else ""
    whole = not names and all(isinstance(record.get(side), list) for side in ("chosen", "rejected"))
    if whole:
        prefix, chosen, rejected, ends = _first_difference(record, where)
    else:
        chosen, rejected = (_joined(record, side, where) for side in ("chosen", "rejected"))
        ends = (_flag(record, "chosen_ends", where), _flag(record, "rejected_ends", where))
    prompt = _prompt(record, where, asked=bool(names) or whole)
    prompt = prompt if isinstance(prompt, str) else led(prompt)
    if isinstance(prompt, str) and (record.get("system") or record.get("tools")):
        raise UserError(f"{where}: `system` and `tools` stand beside strings: write both as messages")
    return StepPair(prompt, prefix, chosen, rejected, ends, tools, numbers)


def read_solutions(record: Mapping[str, Any], where: str) -> list[StepPair]:
    """A pair per right and wrong solution of a question, at the first step in which they differ; each pair once.

    Where no model's solution is right, `ground_truth` takes their place. None where all are right.

    Raises:
      UserError: a solution has no step, or is marked by something else than true or false.
    """
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: marked solutions stand beside no `question`")
    by_mark: dict[bool, list[list[str]]] = {True: [], False: []}
    for name, solution in marked_solutions(record).items():
        by_mark[_flag(solution, "is_correct", f"{where}, {name}")].append(_steps(solution, "solution", where, name))
    if not by_mark[True] and "ground_truth" in record:
        by_mark[True].append(_steps(record, "ground_truth", where))
    prompt = ({"role": "user", "content": question},)
    pairs: dict[tuple[str, str, str], StepPair] = {}
    for right in by_mark[True]:
        for wrong in by_mark[False]:
            at = shared_steps(right, wrong)
            if at == min(len(right), len(wrong)):
                continue  # one goes on where the other stops
            ends = (at == len(right) - 1, at == len(wrong) - 1)
            pair = StepPair(prompt, "".join(right[:at]), right[at], wrong[at], ends)
            pairs.setdefault((pair.prefix, pair.chosen, pair.rejected), pair)
    return list(pairs.values())


def _first_difference(record: Mapping[str, Any], where: str) -> tuple[str, str, str, tuple[bool, bool]]:
    """Of two whole answers: what they share, the two steps behind it, and which of these end their answer."""
    for name in ENDS:
        if name in record:
            raise UserError(f"{where}: `{name}` is not read beside whole answers, whose last steps end them")
    right, wrong = (_listed(record, side, where) for side in ("chosen", "rejected"))
    at = shared_steps(right, wrong)
    if at == min(len(right), len(wrong)):
        how = "have equal steps" if len(right) == len(wrong) else "differ in no step: one goes on where the other ends"
        raise UserError(f"{where}: `chosen` and `rejected` {how}")
    return "".join(right[:at]), right[at], wrong[at], (at == len(right) - 1, at == len(wrong) - 1)


def _prompt(record: Mapping[str, Any], where: str, asked: bool) -> str | Messages:
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where}: `prompt` is empty")
        return ({"role": "user", "content": prompt},) if asked else prompt
    if prompt is None:
        raise UserError(f"{where}: a record of steps needs a `prompt`")
    messages = refuse_flags(read_messages(prompt, "prompt", where), "prompt", where, learned=False)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: `prompt` ends in a turn of the assistant's: write its steps into `prefix`")
    return messages


def _joined(record: Mapping[str, Any], name: str, where: str, empty: bool = False) -> str:
    """A field that is a text or a list of steps. An empty step is counted where pairs are made to fit."""
    value = record.get(name)
    if isinstance(value, list):
        return "".join([] if empty and not value else _listed(record, name, where))
    if not isinstance(value, str):
        raise UserError(f"{where}: `{name}` has to be a string or a list of steps, not {type(value).__name__}")
    return value


def _listed(record: Mapping[str, Any], name: str, where: str) -> list[str]:
    steps = record[name]
    if not steps:
        raise UserError(f"{where}: `{name}` has no steps")
    if not all(isinstance(step, str) and step for step in steps):
        raise UserError(f"{where}: `{name}` has to be a list of strings, none of them empty")
    return steps


def _steps(record: Mapping[str, Any], name: str, where: str, of: str = "") -> list[str]:
    text = record[name]
    steps = split_steps(text) if isinstance(text, str) else []
    if not steps:
        raise UserError(f"{where}: `{f'{of}.' if of else ''}{name}` has no steps")
    return steps


def _flag(record: Mapping[str, Any], name: str, where: str) -> bool:
    value = record.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: `{name}` is {value!r}; it has to be true or false")
    return value
