"""Record formats, recognised by their fields, and the few kinds of example they become.

| fields | format | examples |
|---|---|---|
| `text` | text | Text |
| `instruction`, `input`?, `output` | alpaca | Completion (as messages); Conversation with a `history` |
| `instruction`, `instances` | self-instruct seed tasks | one Completion per instance |
| `conversations` | sharegpt | Conversation |
| `messages` | chat | Conversation |
| `prompt`, `completion` (strings or messages) | prompt and completion | Completion |
| `prompt`?, `chosen`, `rejected` (strings, messages, or transcripts like hh-rlhf's) | preference | Pair |
| `conversations` or `messages`, with `chosen` and `rejected` (one turn each) | sharegpt preference | Pair |
| `instruction`, `input`?, `chosen`, `rejected` (strings) | alpaca preference | Pair (as messages) |
| `prompt` (a string), `chosen`, `rejected` (messages that begin with it) | UltraFeedback, binarized | Pair |
| `instruction`, `completions` (each `response` and `overall_score`) | UltraFeedback | Pair: the best over the worst |
| `prompt`, `completion`, `label` | unpaired preference | Unpaired |
| `kto_tag`, with `messages`, `conversations` or `instruction` and `output` | LLaMA-Factory's KTO | Unpaired |
| `question`, `answer` (with `####` before its result) | GSM8K | Completion (as messages) |
| answers in steps, and solutions marked right or wrong | see `data/stepwise.py` | StepPair |

A pair may bring numbers of its own (`NUMBERS`): a weight, both answers' scores, a margin, how likely its label is
flipped; an unpaired answer a weight.

As in LLaMA-Factory, a `system` text beside messages or an instruction becomes the first message, and a `history` of
[question, answer] pairs becomes the turns before the instruction, whose answers are learned too. `tools` (a list, or
one as a JSON text) go to the chat template, which has to show them. A null field is no field. What isn't read and
would change what is learned (images, reasoning kept apart) is refused; other fields are metadata and ignored.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_jax.base.errors import UserError
from llm_jax.data import judged
from llm_jax.data.judged import Labelled, Ranking, Steps, read_label, read_ranking, read_steps
from llm_jax.data.record_fields import NUMBERS, RecordFields, is_number
from llm_jax.data.stepwise import StepPair, is_step_pair, marked_solutions, read_solutions, read_step_pair
from llm_jax.data.turns import (
    EMPTY,
    Messages,
    Tools,
    read_message,
    read_messages,
    read_sharegpt,
    read_sharegpt_turn,
    refuse_flags,
    split_flags,
)

Kind = Literal[
    "pretrain", "sft", "preference", "unpaired", "unpaired_mismatched", "compared", "labelled", "ranking", "steps"
]
"""What a job's records are. `unpaired_mismatched`: unpaired answers, each beside one that was given to another prompt;
`compared`: pairs whose answers stand behind one another, in both orders; the others: see `data/judged.py`."""
UNPAIRED = ("unpaired", "unpaired_mismatched")
PAIRED = ("preference", "compared")
JUDGED = (*PAIRED, *UNPAIRED, *judged.KINDS)
"""Kinds whose records say which answers are good."""

WANTED = {
    "pretrain": "`text`",
    "sft": "`prompt`+`completion`, `messages`, `conversations`, `instruction`+`output`, `instruction`+`instances`,"
    " `question`+`answer` (GSM8K) or `text`",
    "preference": "`chosen`+`rejected`, with or without `prompt`",
    "compared": "`chosen`+`rejected`, with or without `prompt`",
    **judged.WANTED,
} | dict.fromkeys(UNPAIRED, "`prompt`+`completion`+`label`, or `kto_tag`")
UNREAD = ("functions", "chat_template_kwargs", "image", "images", "videos", "audios")
# Names under which data sets keep a question that TRL calls `prompt`.
QUESTIONS = ("instruction", "input", "question", "query", "messages", "conversations")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


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


def read_examples(kind: Kind, record: Any, where: str, unpair: bool = False) -> list[Example]:
    """The examples a record holds (several for a seed task with several instances).

    Args:
      kind: the job's kind of row.
      record: a JSON value, or a `Text` piece of a text file.
      where: `file:line`, for errors.
      unpair: for unpaired kinds: takes a pair as two answers, the chosen one desirable.

    Raises:
      UserError: the record lacks what the kind needs, or a field has the wrong type or is empty.
    """
    if isinstance(record, Text):
        if kind == "pretrain":
            return [record]
        raise UserError(f"{where}: plain text cannot be used for {kind}, which needs JSONL records of {WANTED[kind]}")
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record has to be a JSON object, not {type(record).__name__}")
    nulls = [name for name, value in record.items() if value is None]
    record = {name: value for name, value in record.items() if value is not None}
    reader = _Reader(record, where)
    if kind == "pretrain" and "text" in record:
        return [Text(reader.text("text"))]
    refuse_unread(record, where)
    if kind in judged.KINDS and (examples := reader.judged(kind, unpair)):
        return examples
    if kind == "preference" and is_step_pair(record):
        numbers = reader.numbers(*NUMBERS)
        return [read_step_pair(record, where, reader.tools(), reader.led, numbers)]
    if kind == "preference" and marked_solutions(record):
        return list(read_solutions(record, where))
    if kind != "sft" and (is_step_pair(record) or marked_solutions(record)):
        raise UserError(f"{where}: pairs of steps are no records of {kind}; a preference job trains on them")
    if kind in PAIRED and ("chosen" in record or "rejected" in record):
        return [reader.pair()]
    if kind in PAIRED and "instruction" in record and "completions" in record:
        return [reader.best_over_worst()]
    if kind in UNPAIRED and unpair and not {"kto_tag", "label"} & record.keys():
        return list(_unpaired(read_examples("preference", record, where)))
    if kind in UNPAIRED and ("kto_tag" in record or "label" in record):
        return [reader.unpaired()]
    if kind == "sft":
        examples = reader.demonstrations()
        if examples:
            return examples
    for name in ("kto_tag", "label"):
        if kind not in judged.KINDS and name in record and (name == "kto_tag" or "completion" in record):
            instead = ", whose losses are of pairs; kto is one of unpaired answers" if kind == "preference" else ""
            raise UserError(f"{where}: unpaired records (with a `{name}`) are not trained on by {kind}{instead}")
    if kind in UNPAIRED and "chosen" in record and "rejected" in record:
        raise UserError(
            f"{where}: a pair (`chosen`+`rejected`) is no record for a loss of unpaired answers, which needs"
            f" {WANTED[kind]}; data.unpair=True takes a pair's answers apart"
        )
    found = ", ".join([f"`{name}`" for name in record] + [f"`{name}` (null)" for name in nulls]) or "no field"
    shown = UNPAIRED[0] if kind in UNPAIRED else kind
    raise UserError(f"{where}: {shown} needs {WANTED[kind]}; the record has {found}")


def refuse_unread(record: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a field, not empty, without which a chat record would mean something else."""
    for name in UNREAD:
        if record.get(name) not in EMPTY:
            raise UserError(f"{where}: `{name}` is not supported, and without it the record would mean something else")


class _Reader(RecordFields):
    """The examples that a record's fields make."""

    def demonstrations(self) -> list[Example]:
        record = self.record
        if "kto_tag" in record or ("label" in record and "completion" in record):
            return []
        if not ("instruction" in record and {"output", "instances"} & record.keys()):
            self.refuse("history", "stands beside no `instruction` and `output`")
        if "messages" in record:
            return [self.conversation("messages", read_messages(record["messages"], "messages", self.where))]
        if "conversations" in record:
            turns = read_sharegpt(record["conversations"], "conversations", self.where)
            return [self.conversation("conversations", turns)]
        if "prompt" in record and "completion" in record:
            prompt, completion = self.either("prompt", learned=False), self.either("completion")
            self.alike(prompt=prompt, completion=completion)
            return [Completion(self.led_prompt(prompt), completion, self.tools())]
        if "instruction" in record and "instances" in record:
            return self.instances()
        if "instruction" in record and "output" in record:
            return [self.alpaca(self.text("input", empty=True), self.text("output"))]
        if "question" in record and "####" in str(record.get("answer")):
            asked = ({"role": "user", "content": self.text("question")},)
            return [Completion(self.led(asked), ({"role": "assistant", "content": self.text("answer")},))]
        if "text" in record:
            self.refuse("tools", "stands beside plain text: write both as messages")
            return [Text(self.text("text"))]
        return []

    def judged(self, kind: Kind, unpair: bool) -> list[Example]:
        """What `data/judged.py` says of; nothing where the record lacks a field."""
        record = self.record
        if kind == "labelled" and unpair and "label" not in record:
            both = _unpaired(read_examples("preference", record, self.where))
            return [Labelled(Completion(one.prompt, one.completion, one.tools), int(one.label)) for one in both]
        if kind == "labelled" and "label" in record:
            label = read_label(record["label"], "label", self.where)
            inner = _Reader({n: v for n, v in record.items() if n != "label"}, self.where)
            return [
                Labelled(example, label)
                for example in inner.demonstrations()
                if isinstance(example, Text | Completion | Conversation)
            ]
        if kind == "labelled" or "prompt" not in record or "completions" not in record:
            return []
        prompt = self.led_prompt(self.either("prompt", learned=False))
        read = read_steps if kind == "steps" else read_ranking
        return [read(record, prompt, self.tools(), self.where)]

    def conversation(self, name: str, turns: Messages) -> Conversation:
        messages, learned = split_flags(turns)
        if not any(m["role"] == "assistant" for m in messages):
            who = "message of the assistant" if name == "messages" else "turn of gpt"
            raise UserError(f"{self.where}: `{name}` has no {who}, so nothing to learn")
        if learned and not any(learned):
            raise UserError(f"{self.where}: `{name}` has no turn that is learned (`train`, `weight`)")
        return Conversation(self.led(messages), self.tools(wrap=name == "conversations"), learned)

    def pair(self) -> Pair:
        missing = [name for name in ("chosen", "rejected") if name not in self.record]
        if missing:
            raise UserError(f"{self.where}: the record has no `{missing[0]}`")
        if all(isinstance(self.record[name], dict) for name in ("chosen", "rejected")):
            return self.turn_pair()
        chosen, rejected = self.either("chosen"), self.either("rejected")
        self.alike(chosen=chosen, rejected=rejected)
        whole = not isinstance(chosen, str) and chosen[0]["role"] != "assistant"
        if "prompt" in self.record and whole:
            return self.transcripts(chosen, rejected)
        if "instruction" in self.record and "prompt" not in self.record and isinstance(chosen, str):
            return self.alpaca_pair()
        self.refuse("history", "is not read in pairs: write it into `prompt`, as messages")
        if "prompt" in self.record:
            prompt = self.either("prompt", learned=False)
            self.alike(prompt=prompt, chosen=chosen)
            return Pair(self.led_prompt(prompt), chosen, rejected, self.tools(), self.numbers(*NUMBERS))
        if isinstance(chosen, str) and isinstance(rejected, str) and all(map(TRANSCRIPT.match, (chosen, rejected))):
            chosen, rejected = _transcript(chosen), _transcript(rejected)
        if isinstance(chosen, str):  # messages hold what was asked
            for name in QUESTIONS:
                self.refuse(name, "is not read in pairs: call what is asked `prompt`")
        pair = _split_shared(chosen, rejected)
        if not pair.prompt:
            raise UserError(f"{self.where}: no `prompt`, and `chosen` and `rejected` share no beginning")
        return Pair(self.led_prompt(pair.prompt), pair.chosen, pair.rejected, self.tools(), self.numbers(*NUMBERS))

    def transcripts(self, chosen: Any, rejected: Any) -> Pair:
        """Whole conversations that say again what the record's `prompt` says."""
        said, asked = self.record["prompt"], self.either("prompt", learned=False)
        asked = ({"role": "user", "content": said},) if isinstance(asked, str) else asked
        for name, turns in (("chosen", chosen), ("rejected", rejected)):
            skipped = int(turns[0]["role"] == "system" and asked[0]["role"] != "system")
            begun = tuple(turns[: skipped + len(asked)])
            if begun[skipped:] != tuple(asked) or begun != tuple(chosen[: len(begun)]):
                raise UserError(f"{self.where}: `prompt` is no prefix of `{name}`, which begins with another turn")
            if len(turns) == len(begun):
                raise UserError(f"{self.where}: `{name}` is no more than the prompt: it has no answer")
        cut = len(asked) + int(chosen[0]["role"] == "system" and asked[0]["role"] != "system")
        return Pair(self.led(chosen[:cut]), chosen[cut:], rejected[cut:], self.tools(), self.numbers(*NUMBERS))

    def best_over_worst(self) -> Pair:
        """Several scored answers to one instruction: the best over the worst. Where all score the same it is a pair
        of equal answers, which is counted and left out."""
        answers = self.record["completions"]
        if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(a, dict) for a in answers):
            raise UserError(f"{self.where}: `completions` has to be a list of two or more objects")
        scored: list[tuple[float, str]] = []
        for index, answer in enumerate(answers):
            score, response = answer.get("overall_score"), answer.get("response")
            if not isinstance(response, str) or not is_number(score):
                name = f"completions[{index}]"
                raise UserError(f"{self.where}: `{name}` needs a text `response` and a number `overall_score`")
            scored.append((float(score), response))
        best, worst = max(scored, key=lambda one: one[0]), min(scored, key=lambda one: one[0])
        worst = best if best[0] == worst[0] else worst
        sides = [({"role": "assistant", "content": response},) for _, response in (best, worst)]
        numbers = {"chosen_score": best[0], "rejected_score": worst[0]}
        prompt = (*self.system(), {"role": "user", "content": self.text("instruction")})
        return Pair(prompt, sides[0], sides[1], self.tools(wrap=True), numbers)

    def unpaired(self) -> Unpaired:
        name = "kto_tag" if "kto_tag" in self.record else "label"
        label = self.record[name]
        if label not in (0, 1):  # False and True are these too
            raise UserError(f"{self.where}: `{name}` is {label!r}; an answer is desirable (true) or not (false)")
        inner = _Reader({n: v for n, v in self.record.items() if n not in ("kto_tag", "label")}, self.where)
        found = inner.demonstrations()
        if len(found) != 1 or not isinstance(found[0], Completion | Conversation):
            raise UserError(f"{self.where}: `{name}` stands beside no prompt and answer")
        prompt, completion = _asked_and_answered(found[0], self.where)
        return Unpaired(prompt, completion, bool(label), found[0].tools, self.numbers("weight"))

    def turn_pair(self) -> Pair:
        """`conversations` or `messages`, and two turns that could come next."""
        name = next((n for n in ("conversations", "messages", "prompt") if n in self.record), None)
        if name is None:
            raise UserError(f"{self.where}: `chosen` and `rejected` are turns, but there are no `conversations` before")
        shared = name == "conversations"
        self.refuse("history", "is not read beside turns: write it into them")
        prompt = (read_sharegpt if shared else read_messages)(self.record[name], name, self.where)
        read, answers = read_sharegpt_turn if shared else read_message, []
        for side in ("chosen", "rejected"):
            answers.append(refuse_flags((read(self.record[side], side, self.where),), side, self.where, learned=True))
            if answers[-1][0]["role"] != "assistant":
                raise UserError(f"{self.where}: `{side}` is no turn of the assistant's")
        prompt = self.led(refuse_flags(prompt, name, self.where, learned=False))
        return Pair(prompt, answers[0], answers[1], self.tools(wrap=shared), self.numbers(*NUMBERS))

    def alpaca_pair(self) -> Pair:
        question = self.question(self.text("input", empty=True))
        sides = [({"role": "assistant", "content": self.text(name)},) for name in ("chosen", "rejected")]
        prompt = (*self.system(), *self.history(), question)
        return Pair(prompt, sides[0], sides[1], self.tools(wrap=True), self.numbers(*NUMBERS))

    def alpaca(self, text: str, output: str) -> Completion | Conversation:
        question, tools = self.question(text), self.tools(wrap=True)
        answer, history = {"role": "assistant", "content": output}, self.history()
        if history:
            return Conversation((*self.system(), *history, question, answer), tools)
        return Completion((*self.system(), question), (answer,), tools)

    def instances(self) -> list[Example]:
        instances = self.record["instances"]
        if not isinstance(instances, list) or not instances:
            raise UserError(f"{self.where}: `instances` has to be a list, and not empty")
        examples: list[Example] = []
        for index, instance in enumerate(instances):
            if not isinstance(instance, dict):
                raise UserError(f"{self.where}: `instances[{index}]` has to be an object with `input` and `output`")
            inner = _Reader(instance, f"{self.where}, instance {index + 1}")
            examples.append(self.alpaca(inner.text("input", empty=True), inner.text("output")))
        return examples


def _asked_and_answered(example: Completion | Conversation, where: str) -> tuple[str | Messages, str | Messages]:
    """Of a conversation the last turn is the answer, and the turns before are the prompt."""
    if isinstance(example, Completion):
        return example.prompt, example.completion
    if example.learned or len(example.messages) < 2 or example.messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: an unpaired conversation has to end with the answer that is judged, a whole turn")
    return example.messages[:-1], example.messages[-1:]


def _unpaired(pairs: list[Example]) -> list[Unpaired]:
    """The two answers of a pair, each on its own."""
    (pair,) = pairs
    assert isinstance(pair, Pair)
    numbers = {"weight": pair.numbers["weight"]} if "weight" in pair.numbers else {}
    return [
        Unpaired(pair.prompt, pair.chosen, True, pair.tools, numbers),
        Unpaired(pair.prompt, pair.rejected, False, pair.tools, numbers),
    ]


def _transcript(text: str) -> Messages:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...` as messages."""
    pieces = TRANSCRIPT.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple({"role": roles[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2]))


def _split_shared(chosen: Any, rejected: Any) -> Pair:
    """Takes the shared beginning as the prompt, as TRL's `extract_prompt` does; messages are never all taken."""
    length, limit = 0, min(len(chosen), len(rejected))
    if not isinstance(chosen, str):
        limit -= 1
    while length < limit and chosen[length] == rejected[length]:
        length += 1
    if isinstance(chosen, str) and length > 0 and chosen[length - 1] == " ":
        length -= 1  # the space before a word belongs to the answer
    return Pair(chosen[:length], chosen[length:], rejected[length:])
