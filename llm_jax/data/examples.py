"""The kinds of record that jobs train on, and the few kinds of example that records become."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llm_jax.data import judged
from llm_jax.data.judged import Labelled, Ranking, Steps
from llm_jax.data.stepwise import StepPair
from llm_jax.data.turns import Messages, Tools

Kind = Literal[
    "pretrain", "sft", "preference", "unpaired", "unpaired_mismatched", "compared", "labelled", "ranking", "steps"
]
"""What a job's records are. `unpaired_mismatched`: unpaired answers, each beside one that was given to another prompt;
`compared`: pairs whose answers stand behind one another, in both orders; the others: see `data/judged.py`."""
UNPAIRED = ("unpaired", "unpaired_mismatched")
PAIRED = ("preference", "compared")
JUDGED = (*PAIRED, *UNPAIRED, *judged.KINDS)
"""Kinds whose records say which answers are good."""


@dataclass(frozen=True)
class Text:
    """Plain text; every token is a target. `begins` and `ends` tell pieces of a file from whole documents."""

    text: str
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow, both strings or both messages; the completion's tokens are targets."""

    prompt: str | Messages
    completion: str | Messages
    tools: Tools = ()


@dataclass(frozen=True)
class Conversation:
    """Messages; the tokens of the assistant's turns are targets: of all, or of those that `learned` says (one each)."""

    messages: Messages
    tools: Tools = ()
    learned: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, all strings or all messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: Tools = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Those of `NUMBERS` that the record has."""


@dataclass(frozen=True)
class Unpaired:
    """An answer to a prompt, both strings or both messages, and whether it is a desirable one."""

    prompt: str | Messages
    completion: str | Messages
    label: bool
    tools: Tools = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


Example = Text | Completion | Conversation | Pair | StepPair | Unpaired | Labelled | Ranking | Steps
