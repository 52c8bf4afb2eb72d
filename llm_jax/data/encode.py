"""Examples as ids and masks, many at a time.

As in TRL (`trl.SFTTrainer`, `trl.DPOTrainer`): prompt and answer are encoded together and the answer begins where that
departs from the prompt alone; plain strings get what the tokenizer's post-processor adds and an eos; conversations get
neither, their template writes all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import tokenizers as hf
from jaxtyping import Int32, UInt8

from llm_jax.base.errors import UserError
from llm_jax.data.chat import Tools, render_text, render_with_spans, span_mask
from llm_jax.data.examples import Completion, Conversation, Example, Kind, Pair, Text, Unpaired
from llm_jax.data.judged import Labelled, Ranking, Steps, behind
from llm_jax.data.stepwise import StepPair
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.data.turns import Messages

# Encoded at a time: enough to keep all cores busy, little enough to stop early at no cost.
BATCH_EXAMPLES, BATCH_CHARACTERS = 512, 500_000
STEP_END = "\n"


class Sequence(NamedTuple):
    """One segment to be: ids, and 1 for each token that is a target."""

    ids: Int32[np.ndarray, "n"]
    mask: UInt8[np.ndarray, "n"]


class Encoded(NamedTuple):
    """An example's sequences (two for a pair: chosen, rejected), how long its prompt is, and where it stands."""

    where: str
    sequences: tuple[Sequence, ...]
    prompt_length: int
    merged: bool  # whether the prompt's last tokens changed when the answer was put after it
    columns: Mapping[str, float] = {}  # numbers of a pair or an unpaired answer, by column of the row
    blank: str = ""  # which of a pair's answers, or of an unpaired one, is empty: it says nothing but its end


class _Plan(NamedTuple):
    """Texts to encode, and what to make of their encodings."""

    texts: list[str]
    add_special_tokens: bool
    finish: Callable[[list[hf.Encoding]], Encoded]


def encode_examples(kind: Kind, examples: Iterable[tuple[str, Example]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encodes (where, example) pairs in order.

    Raises:
      UserError: a template refuses a record, or nothing of it would be a target.
    """
    for plans in _batches(_plan(kind, where, example, tokenizer) for where, example in examples):
        encodings: dict[bool, Iterator[hf.Encoding]] = {}
        for add in (False, True):
            texts = [text for plan in plans if plan.add_special_tokens == add for text in plan.texts]
            encodings[add] = iter(tokenizer.encode_batch(texts, add_special_tokens=add, offsets=kind != "pretrain"))
        for plan in plans:
            yield plan.finish([next(encodings[plan.add_special_tokens]) for _ in plan.texts])


def _batches(plans: Iterable[_Plan]) -> Iterator[list[_Plan]]:
    batch, characters = [], 0
    for plan in plans:
        batch.append(plan)
        characters += sum(map(len, plan.texts))
        if len(batch) == BATCH_EXAMPLES or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _plan(kind: Kind, where: str, example: Example, tokenizer: Tokenizer) -> _Plan:
    try:
        match example:
            case Text() if kind == "pretrain":
                return _Plan([example.text], False, lambda e: _document(where, e[0].ids, example, tokenizer))
            case Text():
                return _Plan([_ended(example.text, tokenizer)], True, lambda e: _whole(where, e[0].ids))
            case Completion():
                answers = (example.completion,)
                return _answers(where, example.prompt, answers, tokenizer, example.tools)
            case Pair() if kind == "compared":
                both = (example.chosen, example.rejected), (example.rejected, example.chosen)
                orders = {"chosen": behind(*both[0]), "rejected": behind(*both[1])}
                blank = next((n for n in orders if _is_blank(getattr(example, n))), "")
                plan = _judged(where, example, orders, tokenizer, example.numbers)
                return plan._replace(finish=lambda e: plan.finish(e)._replace(blank=blank))
            case Pair():
                answers = {"chosen": example.chosen, "rejected": example.rejected}
                return _judged(where, example, answers, tokenizer, example.numbers)
            case StepPair():
                return _steps(where, example, tokenizer)
            case Unpaired():
                columns = {"label": float(example.label), **example.numbers}
                return _judged(where, example, {"completion": example.completion}, tokenizer, columns)
            case Labelled():
                plan, columns = _plan("sft", where, example.example, tokenizer), {"label": float(example.label)}
                return plan._replace(finish=lambda e: plan.finish(e)._replace(columns=columns))
            case Ranking():
                return _answers(where, example.prompt, example.answers, tokenizer, example.tools)
            case Steps():
                return _judged_steps(where, example, tokenizer)
            case Conversation():
                text, spans = render_with_spans(tokenizer, example.messages, example.tools, example.learned)
                return _Plan([text], False, lambda e: _spanned(where, e[0].ids, span_mask(e[0], spans)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _sequence(ids: list[int], mask: list[int]) -> Sequence:
    return Sequence(np.array(ids, np.int32), np.array(mask, np.uint8))


def _document(where: str, ids: list[int], example: Text, tokenizer: Tokenizer) -> Encoded:
    opening = [tokenizer.bos_id] if example.begins and tokenizer.bos_id is not None else []
    return _whole(where, [*opening, *ids, *([tokenizer.eos_id] if example.ends else [])])


def _whole(where: str, ids: list[int]) -> Encoded:
    return Encoded(where, (Sequence(np.array(ids, np.int32), np.ones(len(ids), np.uint8)),), 0, False)


def _spanned(where: str, ids: list[int], mask: list[int]) -> Encoded:
    if 1 not in mask:
        raise UserError(f"{where}: the chat template leaves no token of the assistant's in the loss mask")
    return Encoded(where, (_sequence(ids, mask),), mask.index(1), False)


def _ended(text: str, tokenizer: Tokenizer) -> str:
    eos = tokenizer.special("eos_token") or ""
    return text if text.endswith(eos) else text + eos


def _answers(
    where: str, prompt: str | Messages, answers: tuple[str | Messages, ...], tokenizer: Tokenizer, tools: Tools
) -> _Plan:
    if isinstance(prompt, str):
        alone = prompt
        wholes = [_ended(prompt + answer, tokenizer) for answer in answers if isinstance(answer, str)]
    else:
        alone = render_text(tokenizer, prompt, add_generation_prompt=True, tools=tools)
        conversations = [(*prompt, *answer) for answer in answers if not isinstance(answer, str)]
        wholes = [render_text(tokenizer, conversation, tools=tools) for conversation in conversations]

    def finish(encodings: list[hf.Encoding]) -> Encoded:
        before, *rest = (encoding.ids for encoding in encodings)
        return _masked(where, before, rest)

    return _Plan([alone, *wholes], isinstance(prompt, str), finish)


def _masked(where: str, before: list[int], wholes: list[list[int]]) -> Encoded:
    """Wholes whose targets begin where the first of them departs from what stands before, for all at one place."""
    length = min(_common_prefix(before, ids) for ids in wholes)
    for ids in wholes:
        if len(ids) == length:
            raise UserError(f"{where}: the answer is empty, so no token of it would be in the loss mask")
    sequences = tuple(_sequence(ids, [0] * length + [1] * (len(ids) - length)) for ids in wholes)
    return Encoded(where, sequences, length, length < len(before))


def _judged(
    where: str,
    example: Pair | Unpaired,
    answers: Mapping[str, str | Messages],
    tokenizer: Tokenizer,
    columns: Mapping[str, float],
) -> _Plan:
    """Answers of which it is known how good they are: with the record's numbers, and the first that is empty."""
    plan = _answers(where, example.prompt, tuple(answers.values()), tokenizer, example.tools)
    prompt = example.prompt
    if not isinstance(prompt, str):
        _check_prefix(plan.texts, tuple(answers), lambda: render_text(tokenizer, prompt, tools=example.tools))
    blank = next((name for name, answer in answers.items() if _is_blank(answer)), "")
    return plan._replace(finish=lambda e: plan.finish(e)._replace(columns=dict(columns), blank=blank))


def _steps(where: str, example: StepPair, tokenizer: Tokenizer) -> _Plan:
    """Two steps behind a prefix; the end of a turn or a text only behind one that ends its answer."""
    prompt, prefix, eos = example.prompt, example.prefix, tokenizer.special("eos_token")
    if eos and eos in prefix:
        raise UserError(f"wrong prefix: it contains the end token {eos}, so no step can follow")
    if isinstance(prompt, str):
        opened = prompt
    else:
        opened = render_text(tokenizer, prompt, add_generation_prompt=True, tools=example.tools)
    wholes: list[str] = []
    for name, step, ends in zip(("chosen", "rejected"), (example.chosen, example.rejected), example.ends, strict=True):
        whole = opened + prefix + step
        if ends and isinstance(prompt, str):
            whole = _ended(whole, tokenizer)
        elif ends and not isinstance(prompt, str):
            said: Messages = ({"role": "assistant", "content": prefix + step},)
            whole = render_text(tokenizer, (*prompt, *said), tools=example.tools)
            if not whole.startswith(opened + prefix):
                raise UserError(f"wrong prefix: the chat template writes prompt and steps before `{name}` differently")
        wholes.append(whole)

    def finish(encodings: list[hf.Encoding]) -> Encoded:
        before, *rest = (list(encoding.ids) for encoding in encodings)
        for ids, ends, whole in zip(rest, example.ends, wholes, strict=True):
            # A post-processor may end every text that it is given.
            if (
                isinstance(prompt, str)
                and not ends
                and ids[-1:] == [tokenizer.eos_id]
                and not (eos and whole.endswith(eos))
            ):
                ids.pop()
        if blank:
            return Encoded(where, tuple(_sequence(ids, [0] * len(ids)) for ids in rest), len(before), False, {}, blank)
        return _masked(where, before, rest)._replace(columns=dict(example.numbers))

    blank = next((n for n, s in (("chosen", example.chosen), ("rejected", example.rejected)) if not s.strip()), "")
    return _Plan([opened + prefix, *wholes], isinstance(prompt, str), finish)


def _judged_steps(where: str, example: Steps, tokenizer: Tokenizer) -> _Plan:
    """A prompt and its steps, a line each: what is judged is read at the line's end, and nothing but what comes before
    decides about its tokens, so that a step can be judged before the next is written.

    As TRL's PRMTrainer did it: pieces are encoded one by one, and a BOS, where the tokenizer has one, stands before.
    """
    prompt = example.prompt
    if isinstance(prompt, str):
        opened, first = prompt, [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    else:
        opened, first = render_text(tokenizer, prompt, add_generation_prompt=True, tools=example.tools), []

    def finish(encodings: list[hf.Encoding]) -> Encoded:
        before, end, *steps = (encoding.ids for encoding in encodings)
        ids, mask = [*first, *before], [0] * (len(first) + len(before))
        for step in steps:
            ids += [*step, *end]
            mask += [0] * (len(step) + len(end) - 1) + [1]
        columns = {f"step_{i}": float(label) for i, label in enumerate(example.labels)}
        return Encoded(where, (_sequence(ids, mask),), len(first) + len(before), False, columns)

    return _Plan([opened, STEP_END, *example.steps], False, finish)


def _check_prefix(texts: list[str], names: tuple[str, ...], unopened: Callable[[], str]) -> None:
    """Raises UserError where a template writes a prompt differently when an answer follows."""
    alone, *wholes = texts
    for name, whole in zip(names, wholes, strict=True):
        # What opens the assistant's turn may differ (an empty thought, say); what was asked may not.
        if not whole.startswith(alone) and not whole.startswith(unopened()):
            raise UserError(f"the chat template's prompt is no prefix of prompt and `{name}` together")


def _is_blank(answer: str | Messages) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    return not any(message.get("content", "").strip() or message.get("tool_calls") for message in answer)


def _common_prefix(a: list[int], b: list[int]) -> int:
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return length
