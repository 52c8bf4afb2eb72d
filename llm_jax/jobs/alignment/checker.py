"""Whether an answer ends in the right one: text in, true or false out."""

import re
from decimal import Decimal, InvalidOperation

from llm_jax.data.embedded.problems import is_correct
from llm_jax.jobs.alignment.prompts import Prompt

MARKED = re.compile(r"(?:####|\bAnswer:|^A:)[^\S\n]*((?:(?!####|\bAnswer:)[^\n])+)", re.MULTILINE)
NUMBER = re.compile(r"-?\$?-?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> str | None:
    """What stands last behind `####`, `Answer:` or, at a line's start, `A:`; None where nothing does."""
    marked = MARKED.findall(text)
    return marked[-1].strip() if marked else None


def is_right(prompt: Prompt, text: str) -> bool:
    """Whether the final answer of a text is the prompt's.

    Of a word problem as `problems.is_correct`. Else numbers are compared as numbers (`1,000.0` is `$1000`): the first
    of what is marked; other answers as text without regard to case, outer spaces and a full stop. An answer that is
    marked nowhere is wrong.
    """
    assert prompt.answer is not None, "the caller has checked that each prompt has an answer"
    if prompt.problem is not None:
        return is_correct(prompt.problem, text)
    said, right = final_answer(text), prompt.answer.strip()
    if said is None:
        return False
    wanted = number_in(right) if NUMBER.fullmatch(right) else None
    if wanted is not None:
        return number_in(said) == wanted
    return said.rstrip(".").strip().casefold() == right.rstrip(".").strip().casefold()


def number_in(text: str) -> Decimal | None:
    """The first number of a text."""
    found = NUMBER.search(text)
    if found is None:
        return None
    try:
        return Decimal(found[0].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
