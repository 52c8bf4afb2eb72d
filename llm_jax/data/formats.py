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

A `system` text beside messages or an instruction becomes the first message; a `history` of [question, answer] pairs
becomes the turns before the instruction, and its answers are learned too (as LLaMA-Factory does). What isn't read and
would change what is learned (tools, images, weights of turns) is refused; other fields are metadata and ignored.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llm_jax.base.errors import UserError

Kind = Literal["pretrain", "sft", "preference"]
Messages = tuple[Mapping[str, Any], ...]

WANTED = {
    "pretrain": "`text`",
    "sft": "`prompt`+`completion`, `messages`, `conversations`, `instruction`+`output`, `instruction`+`instances`"
    " or `text`",
    "preference": "`chosen`+`rejected`, with or without `prompt`",
}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
UNREAD = ("tools", "functions", "chat_template_kwargs", "image", "images", "videos", "audios")
UNREAD_IN_MESSAGE = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking")
TOOL_ROLES = ("tool", "function", "ipython")
# Names under which data sets keep a question that TRL calls `prompt`.
QUESTIONS = ("instruction", "input", "question", "query", "messages", "conversations")
EMPTY = (None, "", [], {}, "[]", "{}")
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


@dataclass(frozen=True)
class Conversation:
    """Messages; the tokens of every assistant turn are targets."""

    messages: Messages


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, all strings or all messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages


Example = Text | Completion | Conversation | Pair


def read_examples(kind: Kind, record: Any, where: str) -> list[Example]:
    """The examples a record holds (several for a seed task with several instances).

    Args:
      kind: the job's kind of row.
      record: a JSON value, or a `Text` piece of a text file.
      where: `file:line`, for errors.

    Raises:
      UserError: the record lacks what the kind needs, or a field has the wrong type or is empty.
    """
    if isinstance(record, Text):
        if kind == "pretrain":
            return [record]
        raise UserError(f"{where}: plain text cannot be used for {kind}, which needs JSONL records of {WANTED[kind]}")
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record has to be a JSON object, not {type(record).__name__}")
    reader = _Reader(record, where)
    if kind == "pretrain" and "text" in record:
        return [Text(reader.text("text"))]
    refuse_unread(record, where)
    if kind == "preference" and ("chosen" in record or "rejected" in record):
        return [reader.pair()]
    if kind == "sft":
        examples = reader.demonstrations()
        if examples:
            return examples
    if "label" in record and "completion" in record:
        raise UserError(f"{where}: unpaired records (`prompt`+`completion`+`label`) are not trained on by {kind}")
    found = ", ".join(f"`{name}`" for name in record) or "no field"
    raise UserError(f"{where}: {kind} needs {WANTED[kind]}; the record has {found}")


def refuse_unread(record: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a field, not empty, without which a chat record would mean something else."""
    for name in UNREAD:
        if record.get(name) not in EMPTY:
            raise UserError(f"{where}: `{name}` is not supported, and without it the record would mean something else")


@dataclass(frozen=True)
class _Reader:
    record: dict[str, Any]
    where: str

    def demonstrations(self) -> list[Example]:
        record = self.record
        if "label" in record and "completion" in record:
            return []
        if record.get("kto_tag") is not None:
            raise UserError(f"{self.where}: unpaired records (`kto_tag`) are not trained on by sft")
        if not ("instruction" in record and {"output", "instances"} & record.keys()):
            self.refuse("history", "stands beside no `instruction` and `output`")
        if "messages" in record:
            return [Conversation(self.led(self.messages("messages", answered=True)))]
        if "conversations" in record:
            return [Conversation(self.led(self.sharegpt()))]
        if "prompt" in record and "completion" in record:
            prompt, completion = self.either("prompt"), self.either("completion")
            self.alike(prompt=prompt, completion=completion)
            return [Completion(self.led_prompt(prompt), completion)]
        if "instruction" in record and "instances" in record:
            return self.instances()
        if "instruction" in record and "output" in record:
            return [self.alpaca(self.text("input", empty=True), self.text("output"))]
        if "text" in record:
            return [Text(self.text("text"))]
        return []

    def pair(self) -> Pair:
        missing = [name for name in ("chosen", "rejected") if name not in self.record]
        if missing:
            raise UserError(f"{self.where}: the record has no `{missing[0]}`")
        chosen, rejected = self.either("chosen"), self.either("rejected")
        self.alike(chosen=chosen, rejected=rejected)
        self.refuse("history", "is not read in pairs: write it into `prompt`, as messages")
        if "prompt" in self.record:
            prompt = self.either("prompt")
            self.alike(prompt=prompt, chosen=chosen)
            return Pair(self.led_prompt(prompt), chosen, rejected)
        if isinstance(chosen, str) and isinstance(rejected, str) and all(map(TRANSCRIPT.match, (chosen, rejected))):
            chosen, rejected = _transcript(chosen), _transcript(rejected)
        if isinstance(chosen, str):  # messages hold what was asked
            for name in QUESTIONS:
                self.refuse(name, "is not read in pairs: call what is asked `prompt`")
        pair = _split_shared(chosen, rejected)
        if not pair.prompt:
            raise UserError(f"{self.where}: no `prompt`, and `chosen` and `rejected` share no beginning")
        return Pair(self.led_prompt(pair.prompt), pair.chosen, pair.rejected)

    def refuse(self, name: str, why: str) -> None:
        if self.record.get(name) not in EMPTY:
            raise UserError(f"{self.where}: `{name}` {why}")

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
        self.refuse("system", "stands beside strings: write both as messages")
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
        value = self.record.get(name, "" if empty else None)
        if not isinstance(value, str):
            raise UserError(f"{self.where}: `{name}` has to be a string, not {type(value).__name__}")
        if not value and not empty:
            raise UserError(f"{self.where}: `{name}` is empty")
        return value

    def either(self, name: str) -> str | Messages:
        """A field that may be a string or messages."""
        value = self.record[name]
        if isinstance(value, str):
            return self.text(name, empty=name != "prompt")
        return self.messages(name)

    def alike(self, **fields: str | Messages) -> None:
        if len({isinstance(value, str) for value in fields.values()}) > 1:
            names = " and ".join(f"`{name}`" for name in fields)
            raise UserError(f"{self.where}: {names} have to be both strings or both lists of messages")

    def messages(self, name: str, answered: bool = False) -> Messages:
        value = self.record[name]
        if not isinstance(value, list) or not value:
            raise UserError(f"{self.where}: `{name}` has to be a list of messages, and not empty")
        messages = tuple(self.message(m, f"{name}[{i}]") for i, m in enumerate(value))
        if answered and not any(m["role"] == "assistant" for m in messages):
            raise UserError(f"{self.where}: `{name}` has no message of the assistant, so nothing to learn")
        return messages

    def message(self, value: Any, name: str) -> Mapping[str, Any]:
        if not isinstance(value, dict) or not isinstance(value.get("role"), str):
            raise UserError(f"{self.where}: `{name}` has to be an object with `role` and `content`")
        self.whole(value, name)
        if value["role"] in TOOL_ROLES:
            raise UserError(f"{self.where}: `{name}.role` is {value['role']!r}: calls of tools are not supported")
        content = value.get("content")
        if isinstance(content, list):  # OpenAI's list of parts
            kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
            if kinds - {"text"} or not all(isinstance(part.get("text"), str) for part in content):
                raise UserError(f"{self.where}: `{name}` has parts that are not text")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise UserError(f"{self.where}: `{name}` has no `content`")
        return {**value, "content": content}

    def whole(self, turn: Mapping[str, Any], name: str) -> None:
        """Raises UserError where more belongs to a turn than its text, or not all turns count alike."""
        for key in UNREAD_IN_MESSAGE:
            if turn.get(key) not in EMPTY:
                raise UserError(f"{self.where}: `{name}.{key}` is not supported, and would be lost")
        if turn.get("weight") not in (None, 1) or turn.get("train") not in (None, True):
            key = "weight" if turn.get("weight") not in (None, 1) else "train"
            raise UserError(f"{self.where}: `{name}.{key}` is {turn[key]!r}; every assistant turn is learned alike")

    def sharegpt(self) -> Messages:
        turns = self.record["conversations"]
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{self.where}: `conversations` has to be a list of turns, and not empty")
        messages = []
        for index, turn in enumerate(turns):
            name = f"conversations[{index}]"
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise UserError(f"{self.where}: `{name}` has to be an object with `from` and `value`")
            self.whole(turn, name)
            role = SHAREGPT_ROLES.get(str(turn.get("from")))
            if role is None:
                raise UserError(f"{self.where}: `{name}` is from {turn.get('from')!r}, not human, gpt or system")
            messages.append({"role": role, "content": turn["value"]})
        if not any(m["role"] == "assistant" for m in messages):
            raise UserError(f"{self.where}: `conversations` has no turn of gpt, so nothing to learn")
        return tuple(messages)

    def alpaca(self, text: str, output: str) -> Completion | Conversation:
        instruction = self.text("instruction")
        question = {"role": "user", "content": f"{instruction}\n\n{text}" if text else instruction}
        answer, history = {"role": "assistant", "content": output}, self.history()
        if history:
            return Conversation((*self.system(), *history, question, answer))
        return Completion((*self.system(), question), (answer,))

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
