"""The host's side of one batch: rows filled up to its shape, and its tokens taken apart as they come."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from llm_jax.base.errors import RunError
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.decode import NO_TOKEN, decode_chunk, start
from llm_jax.inference.logits import row_params
from llm_jax.inference.requests import Row
from llm_jax.inference.sampling import seed_words
from llm_jax.inference.text import TextTracker
from llm_jax.sharding import use

if TYPE_CHECKING:
    from llm_jax.inference.generator import Generator


class Batch:
    """One batch on its way from prompts to texts."""

    def __init__(self, generator: "Generator", rows: list[Row], size: int, prompt_len: int, cache_len: int):
        self.generator = generator
        self.rows = rows
        filler = [Row(-1, 0, [0], SamplingParams(temperature=0.0), 0)] * (size - len(rows))
        padded = rows + filler
        self.cache_len = cache_len
        self.tokens = np.zeros((size, prompt_len), np.int32)
        for i, row in enumerate(padded):
            self.tokens[i, : len(row.ids)] = row.ids
        self.lengths = np.asarray([len(row.ids) for row in padded], np.int32)
        self.max_new = np.asarray([row.max_new for row in padded], np.int32)
        self.words = seed_words([row.params.seed for row in padded])
        self.samples = np.asarray([row.sample for row in padded], np.int32)
        self.sampling = row_params([row.params for row in padded])
        # At least one column, so that a tokenizer more or less is no other program.
        self.stop_ids = np.full((size, max(2, len(generator.stop_ids))), NO_TOKEN, np.int32)
        for i, row in enumerate(padded):
            if not row.params.ignore_eos:
                self.stop_ids[i, : len(generator.stop_ids)] = generator.stop_ids
        self.trackers = [TextTracker(generator.tokenizer, row.params.stop) for row in rows]
        self.logprobs: list[list[float]] = [[] for _ in rows]
        self.pending: list[list[int]] = [[] for _ in rows]
        self.reasons: list[str | None] = [None] * len(rows)

    def chunks(self, every: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and log-probabilities [B, C] as they come, until every row has its finish reason."""
        g = self.generator
        with use(g.plan):
            caches, state, tokens, logprobs = start(
                g.decoder,
                g.params,
                self.tokens,
                self.lengths,
                self.max_new,
                self.words,
                self.samples,
                self.sampling,
                self.stop_ids,
                cache_len=self.cache_len,
                dtype=g.dtype,
            )
        yield np.asarray(tokens)[:, None], np.asarray(logprobs)[:, None]
        while None in self.reasons:
            ended = np.asarray([reason is not None for reason in self.reasons])
            stopped = np.pad(ended, (0, len(self.lengths) - len(self.rows)), constant_values=True)
            with use(g.plan):
                caches, state, tokens, logprobs = decode_chunk(
                    g.decoder,
                    g.params,
                    caches,
                    state,
                    stopped,
                    self.sampling,
                    self.stop_ids,
                    np.int32(every),
                    size=g.chunk,
                )
            yield np.asarray(tokens), np.asarray(logprobs)

    def outputs(self, every: int, live: bool) -> Iterator[tuple]:
        for tokens, logprobs in self.chunks(every):
            counts = (tokens != NO_TOKEN).sum(axis=1)
            for i, row in enumerate(self.rows):
                count = int(counts[i])
                if count:
                    text = self._take(i, tokens[i, :count].tolist(), logprobs[i, :count], live)
                    yield row, self.trackers[i], self.logprobs[i], self.reasons[i], text

    def _take(self, i: int, tokens: list[int], logprobs: np.ndarray, live: bool) -> str:
        """Adds a row's new tokens and finds out whether it has ended; returns its new text."""
        row, tracker = self.rows[i], self.trackers[i]
        if not np.isfinite(logprobs).all():
            raise RunError(f"the model's logits for prompt {row.prompt} are not finite")
        self.logprobs[i] += logprobs.tolist()
        self.pending[i] += tokens
        ended = not row.params.ignore_eos and tokens[-1] in self.generator.stop_ids
        full = len(self.logprobs[i]) >= row.max_new
        text = ""
        if live or row.params.stop or ended or full:
            # The end token is no text: it joins the tokens below.
            ending = [self.pending[i].pop()] if ended else []
            text = tracker.push(self.pending[i])
            self.pending[i] = []
            if not tracker.stopped:
                tracker.tokens += ending
        if tracker.stopped or ended or full:
            del self.logprobs[i][len(tracker.tokens) :]
            self.reasons[i] = "stop" if tracker.stopped or ended else "length"
            text += "" if tracker.stopped else tracker.finish()
        return text
