"""Records of two answers to one prompt, in all the forms that data sets have for them."""

import re
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.data.examples import Pair
from llm_jax.data.record_fields import NUMBERS, RecordFields, is_number
from llm_jax.data.turns import Messages, read_message, read_messages, read_sharegpt, read_sharegpt_turn, refuse_flags

# Names under which data sets keep a question that TRL calls `prompt`.
QUESTIONS = ("instruction", "input", "question", "query", "messages", "conversations")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


class PairRecords(RecordFields):
    """The pair that a record's fields make; raises UserError as `RecordFields`."""

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
