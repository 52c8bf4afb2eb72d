"""Record formats, recognised by their fields.

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

from collections.abc import Mapping
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.data import judged
from llm_jax.data.examples import PAIRED, UNPAIRED, Completion, Conversation, Example, Kind, Pair, Text, Unpaired
from llm_jax.data.judged import Labelled, read_label, read_ranking, read_steps
from llm_jax.data.pair_records import PairRecords
from llm_jax.data.record_fields import NUMBERS
from llm_jax.data.stepwise import is_step_pair, marked_solutions, read_solutions, read_step_pair
from llm_jax.data.turns import EMPTY, Messages, read_messages, read_sharegpt, split_flags

WANTED = {
    "pretrain": "`text`",
    "sft": "`prompt`+`completion`, `messages`, `conversations`, `instruction`+`output`, `instruction`+`instances`,"
    " `question`+`answer` (GSM8K) or `text`",
    "preference": "`chosen`+`rejected`, with or without `prompt`",
    "compared": "`chosen`+`rejected`, with or without `prompt`",
    **judged.WANTED,
} | dict.fromkeys(UNPAIRED, "`prompt`+`completion`+`label`, or `kto_tag`")
UNREAD = ("functions", "chat_template_kwargs", "image", "images", "videos", "audios")


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


class _Reader(PairRecords):
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
