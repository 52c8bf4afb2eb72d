"""A conversation in the terminal."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.data import chat
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.generation_config import GenerationDefaults
from llm_jax.inference.requests import check_prompt

if TYPE_CHECKING:
    from llm_jax.inference.session import Session

HELP = """/reset       forget the conversation (the system prompt stays)
/regenerate  answer the last message anew, with another seed
/help        this
/quit        leave, as the end of the input does
Ctrl-C stops an answer; what was said of it stays in the conversation."""
ASK = "> "


class Chat:
    """Messages so far, and the commands. Answers go to stdout as they come; everything else goes to stderr."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        defaults: GenerationDefaults,
        max_positions: int,
        system: str | None = None,
    ):
        if tokenizer.chat_template is None:
            raise UserError("--chat: the model has no chat template")
        self.tokenizer, self.params, self.defaults, self.max_positions = tokenizer, params, defaults, max_positions
        self.opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.opening)
        self._again = 0
        # What the template can't take (a system prompt, for some) is found before the first question.
        self._ids([*self.opening, {"role": "user", "content": "?"}])

    def run(self, session: "Session") -> None:
        """Reads lines until `/quit` or the end of the input."""
        self.session = session
        if sys.stdin.isatty():
            import readline  # noqa: F401  (line editing and history for `input`)

            log("Type a message, or /help.")
        while True:
            try:
                line = _read_line()
            except KeyboardInterrupt as stop:
                if type(stop) is not KeyboardInterrupt:  # SIGTERM
                    raise
                log("\n/quit or Ctrl-D leaves.")
                continue
            if line is None or line.strip() == "/quit":
                return
            self._handle(line)

    def _handle(self, line: str) -> None:
        command = line.strip()
        if command == "/help":
            log(HELP)
        elif command == "/reset":
            self.messages = list(self.opening)
            log("The conversation is forgotten.")
        elif command == "/regenerate":
            if self.messages[-1:] and self.messages[-1]["role"] == "assistant":
                self._again += 1
                if self.params.temperature == 0:
                    log("Temperature 0: the answer will be the same.")
                self._answer(self.messages[:-1])
            else:
                log("There is no answer to give anew.")
        elif command.startswith("/"):
            log(f"{command.split()[0]} is no command; /help lists them.")
        elif command:
            self._again = 0
            self._answer([*self.messages, {"role": "user", "content": line}])

    def _answer(self, messages: list[dict[str, str]]) -> None:
        """Prints the answer to `messages` and makes both the conversation; a refusal leaves it as it was."""
        try:
            ids = self._ids(messages)
            params = self.defaults.fitted(self.params, len(ids), "the conversation")
        except UserError as error:
            log(f"{error}; /reset begins anew.")
            return
        params = replace(params, seed=(self.params.seed + self._again) % 2**64)
        text = ""
        with _interruptible() as stopped, contextlib.closing(self.session.stream(ids, params)) as deltas:
            for delta in deltas:
                print(delta.text, end="", flush=True)
                text += delta.text
                if stopped:
                    break
        print(flush=True)
        if stopped:
            log("(stopped)")
        self.messages = [*messages, {"role": "assistant", "content": text}]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        ids, _ = chat.render(self.tokenizer, messages, add_generation_prompt=True)
        check_prompt(ids, "the conversation", self.max_positions, self.tokenizer.vocab_size)
        return ids


def _read_line() -> str | None:
    """A line without its end; None at the end of the input. Raises UserError for bytes that are not UTF-8."""
    if sys.stdin.isatty():
        try:
            return input(ASK)
        except EOFError:
            return None
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 (byte {error.start})") from None
    return line.rstrip("\n") if line else None


@contextlib.contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """A list that Ctrl-C makes non-empty, so that decoding stops between two looks and its caches stay whole.

    A second Ctrl-C ends the program as usual.
    """
    stopped: list[bool] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
