"""Command lines of the smaller doors: words and flags; `--flag=value` and `--flag value` are the same."""

from collections.abc import Mapping, Sequence

from llm_jax.base.errors import UserError
from llm_jax.base.nearest import nearest

CONFIG = "--config."
"""Begins a flag that overrides a config's field."""


def read_flags(
    argv: Sequence[str], flags: Mapping[str, str], switches: Sequence[str] = (), overrides: bool = False
) -> tuple[list[str], dict[str, str], list[tuple[str, str]]]:
    """Words, flags with their values (a switch's is empty), and overrides as (dotted name, text).

    Args:
      argv: the command line.
      flags: that take a value, and what stands for it in messages.
      switches: that take none.
      overrides: whether `--config.a.b=value` is read.

    Raises:
      UserError: an unknown flag, or one without its value.
    """
    words: list[str] = []
    given: dict[str, str] = {}
    fields: list[tuple[str, str]] = []
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        is_field = overrides and flag.startswith(CONFIG)
        if not word.startswith("-"):
            words.append(word)
        elif word in switches:
            given[word] = ""
        elif flag in flags or is_field:
            if not equals:
                value = next(rest, "")
            # A field may be set to an empty text, if that is what is written.
            if (not value or value.startswith("--")) and not (equals and is_field):
                raise UserError(f"{flag} needs a value: {flag}={flags.get(flag, '...')}")
            if is_field:
                fields.append((flag.removeprefix(CONFIG), value))
            else:
                given[flag] = value
        else:
            near = nearest(flag, [*flags, *switches])
            raise UserError(f"unknown argument {word}; " + (f"the nearest is {near}" if near else "see --help"))
    return words, given, fields
