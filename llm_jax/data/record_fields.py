"""Fields of a record, each read and checked: strings, messages, tools, numbers; and what stands before messages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.data.turns import EMPTY, Messages, Tools, read_messages, read_tools, refuse_flags

NUMBERS = {
    "weight": ("weight",),
    "chosen_score": ("chosen_score", "score_chosen", "chosen-rating", "chosen_rating"),
    "rejected_score": ("rejected_score", "score_rejected", "rejected-rating", "rejected_rating"),
    "margin": ("margin",),
    "label_smoothing": ("label_smoothing",),
}
"""Columns of a pair, and under which names records have them."""


@dataclass(frozen=True)
class RecordFields:
    """All methods raise UserError, naming field and place, for what is of another type or contradicts another field."""

    record: dict[str, Any]
    where: str
    """`file:line`, for errors."""

    def refuse(self, name: str, why: str) -> None:
        """A field that has to be absent or empty."""
        if self.record.get(name) not in EMPTY:
            raise UserError(f"{self.where}: `{name}` {why}")

    def tools(self, wrap: bool = False) -> Tools:
        return read_tools(self.record.get("tools"), self.where, wrap)

    def system(self) -> Messages:
        """The record's `system` text as a message; none where it is absent or empty."""
        value = self.record.get("system")
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.where}: `system` has to be a string, not {type(value).__name__}")
        return ({"role": "system", "content": value},) if value else ()

    def led(self, messages: Messages) -> Messages:
        """The record's `system` text, where it has one, before its messages."""
        system = self.system()
        if system and any(m["role"] == "system" for m in messages):
            raise UserError(f"{self.where}: `system` stands beside messages that have a system message already")
        return (*system, *messages)

    def led_prompt(self, prompt: str | Messages) -> str | Messages:
        """As `led`; a string cannot be led."""
        if not isinstance(prompt, str):
            return self.led(prompt)
        for name in ("system", "tools"):
            self.refuse(name, "stands beside strings: write both as messages")
        return prompt

    def history(self) -> Messages:
        """The turns before an instruction."""
        value = self.record.get("history") or []
        if not isinstance(value, list):
            raise UserError(f"{self.where}: `history` has to be a list of pairs, not {type(value).__name__}")
        messages: list[Mapping[str, Any]] = []
        for index, turn in enumerate(value):
            if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
                raise UserError(f"{self.where}: `history[{index}]` has to be a pair of strings, [question, answer]")
            messages += ({"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]})
        return tuple(messages)

    def text(self, name: str, empty: bool = False) -> str:
        """A string, which may be absent or `empty`."""
        value = self.record.get(name, "" if empty else None)
        if not isinstance(value, str):
            raise UserError(f"{self.where}: `{name}` has to be a string, not {type(value).__name__}")
        if not value and not empty:
            raise UserError(f"{self.where}: `{name}` is empty")
        return value

    def either(self, name: str, learned: bool = True) -> str | Messages:
        """A field that may be a string or messages, all of them or none of them learned."""
        value = self.record[name]
        if isinstance(value, str):
            return self.text(name, empty=name != "prompt")
        return refuse_flags(read_messages(value, name, self.where), name, self.where, learned)

    def alike(self, **fields: str | Messages) -> None:
        """Fields have to be all strings or all messages."""
        if len({isinstance(value, str) for value in fields.values()}) > 1:
            names = " and ".join(f"`{name}`" for name in fields)
            raise UserError(f"{self.where}: {names} have to be both strings or both lists of messages")

    def question(self, text: str) -> Mapping[str, Any]:
        """An instruction and its input as the user's turn."""
        instruction = self.text("instruction")
        return {"role": "user", "content": f"{instruction}\n\n{text}" if text else instruction}

    def numbers(self, *names: str) -> dict[str, float]:
        """The record's own numbers, of those named, by the name of their column."""
        found = {}
        for column in names:
            for name in NUMBERS[column]:
                value = self.record.get(name)
                if value is None:
                    continue
                if not is_number(value) or (column == "weight" and value < 0):
                    kind = "a number of at least 0" if column == "weight" else "a number"
                    raise UserError(f"{self.where}: `{name}` is {value!r}; it has to be {kind}")
                if column == "label_smoothing" and not 0 <= value <= 0.5:
                    raise UserError(f"{self.where}: `{name}` is {value!r}; it has to lie in [0, 0.5]")
                found[column] = float(value)
        return found


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
