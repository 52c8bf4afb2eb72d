"""Tokens to text as they come: whole characters only, and an eye on stop strings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_jax.data.tokenizers import Tokenizer


class TextTracker:
    """The text of one output, token by token.

    `tokens` and `text` end where a stop string was completed: the token that completed it is the last one, the text
    ends before the string. Neither depends on how the tokens were cut into calls of `push`. Without a tokenizer there
    is no text.
    """

    def __init__(self, tokenizer: "Tokenizer | None", stop: Sequence[str] = ()):
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._shown = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Takes new tokens; returns the text that is now certain and was not returned before."""
        before = len(self.tokens)
        self.tokens += tokens
        self.text = self._decode(len(self.tokens))
        if self._cut(self.text) is not None:
            for count in range(before + 1, len(self.tokens) + 1):
                text = self._decode(count)
                cut = self._cut(text)
                if cut is not None:
                    del self.tokens[count:]
                    self.text, self.stopped = text[:cut], True
                    break
        return self._show(len(self.text) if self.stopped else self._certain())

    def finish(self) -> str:
        """The rest of the text: an unfinished character as U+FFFD, the beginning of a stop string that never came."""
        return self._show(len(self.text))

    def _decode(self, count: int) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(self.tokens[:count], skip_special_tokens=True)

    def _cut(self, text: str) -> int | None:
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return min(found, default=None)

    def _show(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _certain(self) -> int:
        """Characters that no further token can change or take back."""
        end = len(self.text)
        # Up to three bytes of an unfinished character decode to as many replacement characters.
        for _ in range(3):
            if end and self.text[end - 1] == "\ufffd":
                end -= 1
        certain = end
        for stop in self._stop:
            for overlap in range(min(len(stop) - 1, end), 0, -1):
                if self.text.endswith(stop[:overlap], 0, end):
                    certain = min(certain, end - overlap)
                    break
        return certain
