"""The host's side of one batch: rows filled up to its shape, and its tokens taken apart as they come."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import numpy as np

from llm_jax.base.errors import RunError
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.decode import NO_TOKEN, Caches, Drawn, decode_chunk, grow, refill, resume, start
from llm_jax.inference.logits import row_params
from llm_jax.inference.requests import Row
from llm_jax.inference.sampling import seed_words
from llm_jax.inference.text import TextTracker
from llm_jax.models.rope import turning_length
from llm_jax.sharding import use

if TYPE_CHECKING:
    from llm_jax.inference.generator import Generator

# Two threads that call a program for the first time at once would each compile it. A call that is compiled only
# dispatches, so that nobody waits long.
_calls = threading.Lock()

TopLogprobs = list[tuple[int, float]]
"""Likeliest tokens of one step with their log-probabilities, likeliest first."""


@dataclass
class Output:
    """What a row has given so far."""

    row: Row
    tracker: TextTracker
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    reason: str | None = None
    text: str = ""
    """New since the last look."""
    pending: list[int] = field(default_factory=list)
    """Tokens that the tracker has not seen."""


@dataclass(frozen=True)
class Past:
    """Caches of a batch of one row, and the tokens that they hold of it."""

    caches: Caches
    slots: int
    tokens: list[int]


class Batch:
    """One batch on its way from prompts to texts.

    Args:
      rows: at most `size`; samples of one prompt are given the same `ids` object or equal ones.
      prompt_len: tokens that prompts are filled up to.
      slots: those that the longest row may need at its end; caches grow up to it as rows do.
      past: caches of the first tokens of the single row; its caches are used up.
    """

    def __init__(
        self, generator: "Generator", rows: list[Row], size: int, prompt_len: int, slots: int, past: Past | None = None
    ):
        self.generator = generator
        filler = [Row(-1, 0, [0], SamplingParams(temperature=0.0), 0)] * (size - len(rows))
        padded = rows + filler
        self.slots, self.past = slots, past
        prompts = list({row.prompt: row for row in padded}.values())
        # Samples of a prompt share its prefill.
        self.source = None
        if any(row.sample for row in rows):
            at = {row.prompt: i for i, row in enumerate(prompts)}
            self.source = np.asarray([at[row.prompt] for row in padded], np.int32)
            count = generator.batch_size(len(prompts))
            prompts += [Row(-1, 0, [0], SamplingParams(temperature=0.0), 0)] * (count - len(prompts))
        else:
            prompts = padded
        self.tokens = np.zeros((len(prompts), prompt_len), np.int32)
        for i, row in enumerate(prompts):
            self.tokens[i, : len(row.ids)] = row.ids
        self.lengths = np.asarray([len(row.ids) for row in prompts], np.int32)
        self.filled = np.asarray([len(row.ids) for row in padded], np.int32)
        """Tokens of each row in the caches."""
        self.prefix = self.filled.copy() if generator.config.prefix_lm else None
        """Tokens of each row that see each other from both sides."""
        self.prompt_params = generator.params_of([row.choice for row in prompts])
        self.params = self.prompt_params
        if prompts is not padded:
            self.params = generator.params_of([row.choice for row in padded])
        self.stop_ids = np.full((size, max(2, len(generator.stop_ids))), NO_TOKEN, np.int32)
        # At least two columns, so that a tokenizer more or less is no other program.
        for i, row in enumerate(padded):
            if not row.params.ignore_eos:
                self.stop_ids[i, : len(generator.stop_ids)] = generator.stop_ids
        self.requests = (
            np.asarray([row.max_new for row in padded], np.int32),
            seed_words([row.params.seed for row in padded]),
            np.asarray([row.sample for row in padded], np.int32),
            row_params([row.params for row in padded]),
            self.stop_ids,
        )
        self.top = max(row.params.logprobs for row in rows)
        self.results = [Output(row, TextTracker(generator.tokenizer, row.params.stop)) for row in rows]
        self.turn = turning_length(generator.config)
        self.told = [list(row.ids) for row in padded] if self.turn is not None else []
        """Tokens of each row so far, the newest among them; of models whose caches may be made anew."""
        self.caches: Caches | None = None
        self.size = 0
        """Slots of the caches now."""

    def outputs(self, every: int, live: bool) -> Iterator[Output]:
        """Each row with what is new of it, until every row has its finish reason; `live`: its text as it comes."""
        for drawn in self.chunks(every):
            yield from self.take(drawn, live)

    def take(self, drawn: Drawn, live: bool) -> Iterator[Output]:
        """The rows that a chunk has something for, with it in."""
        counts = (drawn.tokens != NO_TOKEN).sum(axis=1)
        for i, result in enumerate(self.results):
            if counts[i]:
                self._take(result, jax.tree.map(lambda x: x[i, : counts[i]], drawn), live)  # noqa: B023
                yield result

    def chunks(self, every: int) -> Iterator[Drawn]:
        """What is drawn as it comes: tokens [B, C] and so on, on the host; `take` each before the next is asked for."""
        g = self.generator
        *_, rows, stop_ids = self.requests
        with _calls, use(g.plan):
            self.caches, state, drawn = self._start(every)
        drawn = jax.tree.map(lambda x: np.asarray(x)[:, None], drawn)
        self._tell(drawn)
        yield drawn
        while not all(result.reason for result in self.results):
            stopped = np.ones(len(self.filled), bool)
            stopped[: len(self.results)] = [result.reason is not None for result in self.results]
            needed = int(self.filled[~stopped].max()) + every
            with _calls, use(g.plan):
                if needed > self.size and self.size < self.slots:
                    self.size = min(g.bucket(needed), self.slots)
                    self.caches = grow(self.caches, cache_len=self.size)
                limit = self._up_to_turn(every, ~stopped)
                self.caches, state, drawn = decode_chunk(
                    g.decoder,
                    self.params,
                    self.caches,
                    state,
                    stopped,
                    rows,
                    stop_ids,
                    np.int32(limit),
                    size=g.chunk,
                    top=self.top,
                )
            drawn = jax.tree.map(np.asarray, drawn)
            self.filled += (drawn.tokens != NO_TOKEN).sum(axis=1, dtype=np.int32)
            self._tell(drawn)
            yield drawn

    def _tell(self, drawn: Drawn) -> None:
        if self.turn is None:
            return
        for told, tokens in zip(self.told, drawn.tokens.tolist()):
            told += [token for token in tokens if token != NO_TOKEN]

    def _up_to_turn(self, every: int, live: np.ndarray) -> int:
        """How many steps all live rows can take before one gets so long that its cache has to be made anew.

        Where one has, it is made here.
        """
        if self.turn is None:
            return every
        g, left = self.generator, self.turn - self.filled[live & (self.filled <= self.turn)]
        if not left.size:
            return every
        if left.min() > 0:
            return min(every, int(left.min()))
        tokens = np.zeros((len(self.told), self.size), np.int32)
        for i, (told, filled) in enumerate(zip(self.told, self.filled)):
            tokens[i, :filled] = told[:filled]
        options = {"cache_len": self.size, "dtype": g.dtype}
        self.caches = refill(g.decoder, self.params, tokens, self.filled, self.prefix, **options)
        rest = left[left > 0]
        return min(every, int(rest.min())) if rest.size else every

    def _start(self, every: int) -> tuple:
        g = self.generator
        self.size = min(max(g.bucket(int(self.filled.max()) + every), self.tokens.shape[1]), self.slots)
        if self.past is None:
            options = {"cache_len": self.size, "dtype": g.dtype, "top": self.top}
            prefix = self.lengths if g.config.prefix_lm else None
            prompts = (self.tokens, self.lengths, self.source)
            return start(g.decoder, self.prompt_params, *prompts, *self.requests, prefix, **options)
        kept, caches = len(self.past.tokens), self.past.caches
        self.size = max(self.size, self.past.slots)
        if self.size > self.past.slots:
            caches = grow(caches, cache_len=self.size)
        ids = self.results[0].row.ids[kept:]
        fresh = np.zeros((1, g.bucket(len(ids))), np.int32)
        fresh[0, : len(ids)] = ids
        starts = np.asarray([kept], np.int32)
        more = (self.tokens, self.lengths, fresh, starts, *self.requests)
        return resume(g.decoder, self.params, caches, *more, top=self.top)

    def _take(self, result: Output, drawn: Drawn, live: bool) -> None:
        """Adds a row's new tokens and finds out whether it has ended."""
        row, tracker, ends = result.row, result.tracker, self.generator.stop_ids
        if not np.isfinite(drawn.logprobs).all():
            raise RunError(f"the model's logits for prompt {row.prompt} are not finite")
        tokens = drawn.tokens.tolist()
        result.logprobs += drawn.logprobs.tolist()
        if drawn.top_ids is not None and drawn.top_logprobs is not None and row.params.logprobs:
            count = row.params.logprobs
            for ids, values in zip(drawn.top_ids.tolist(), drawn.top_logprobs.tolist()):
                result.top_logprobs.append(list(zip(ids[:count], values[:count])))
        result.pending += tokens
        ended = not row.params.ignore_eos and tokens[-1] in ends
        full = len(result.logprobs) >= row.max_new
        result.text = ""
        if live or row.params.stop or ended or full:
            # The end token is no text: it joins the tokens below.
            ending = [result.pending.pop()] if ended else []
            result.text = tracker.push(result.pending)
            result.pending = []
            if not tracker.stopped:
                tracker.tokens += ending
        if tracker.stopped or ended or full:
            del result.logprobs[len(tracker.tokens) :], result.top_logprobs[len(tracker.tokens) :]
            result.reason = "stop" if tracker.stopped or ended else "length"
            result.text += "" if tracker.stopped else tracker.finish()
