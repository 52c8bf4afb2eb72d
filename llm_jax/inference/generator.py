"""Many prompts to many answers: batches, buckets, and what callers see of them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llm_jax.adapters.adapters import Adapters
from llm_jax.adapters.loading import AdaptedModel
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.inference.batch import Batch, Output, TopLogprobs
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.parallel import in_parallel
from llm_jax.inference.requests import Row, make_rows
from llm_jax.inference.steps import decoding_decoder
from llm_jax.kernels.platform import target_platform
from llm_jax.models.cache_bytes import cache_bytes, total_bytes
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder, unstack
from llm_jax.models.parameter import declarations
from llm_jax.sharding import Plan, compute_weights, current_plan, dtype_in_use, use

if TYPE_CHECKING:
    from llm_jax.data.tokenizers import Tokenizer


class GenerativeModel(Protocol):
    """What generation needs of a model: `llm_jax.Model` has it."""

    config: ModelConfig
    decoder: Decoder
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt."""

    prompt: int
    """Index of the prompt in the call."""
    sample: int
    """Number of the sample, from 0."""
    tokens: list[int]
    """New tokens, the one that ended the output (end token, or last of a stop string) included."""
    text: str
    """Their text without special tokens and without the stop string; empty without a tokenizer."""
    finish_reason: str
    """`stop` (end token or stop string) or `length`."""
    logprobs: list[float]
    """Log-probability of each token under the model's own distribution (no penalty, temperature or filter)."""
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """The `SamplingParams.logprobs` likeliest tokens at each place, with theirs; empty where none are asked for."""


@dataclass(frozen=True)
class Delta:
    """News of one sample while it is decoded; `finish_reason` comes with the last."""

    prompt: int
    sample: int
    tokens: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str | None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)


def default_buckets(max_positions: int, smallest: int = 64) -> tuple[int, ...]:
    """`smallest`, and from there 1.5 and 2 times each power of two, up to the model's positions, which end the list."""
    buckets, size = [], smallest
    while size < max_positions:
        buckets += [size, size * 3 // 2]
        size *= 2
    return (*(bucket for bucket in buckets if bucket < max_positions), max_positions)


class Generator:
    """Decodes batches with one compiled program per bucket, and with any weights of the same architecture.

    Args:
      model: has `config`, `decoder` and `params` (stacked or not). Of an `AdaptedModel` each prompt can have another
        adapter.
      tokenizer: for texts, stop strings and end tokens; None decodes ids only.
      max_batch: rows decoded together at most.
      buckets: lengths, ascending, that prompts and caches are rounded up to; None takes `default_buckets`.
      chunk: tokens decoded between two looks of the host.
      stop_ids: end tokens beside the tokenizer's eos and end of turn.
      dtype: of weights, caches and computation; None takes the plan's or else the parameters'.
      plan: mesh to decode on; None takes the model's if it has one.
      max_positions: longest text, prompt and output; None means the model's `max_position_embeddings`. More is for
        positions that go on beyond it (ALiBi, scaled rotations); raises UserError for learned ones.

    A row's tokens are a function of its prompt, its `SamplingParams` and the number of the sample; with whom it shares
    a batch and which bucket it falls into changes the arithmetic's order at most.
    """

    def __init__(
        self,
        model: GenerativeModel,
        tokenizer: "Tokenizer | None" = None,
        *,
        max_batch: int = 32,
        buckets: Sequence[int] | None = None,
        chunk: int = 32,
        stop_ids: Sequence[int] = (),
        dtype: str | None = None,
        plan: Plan | None = None,
        max_positions: int | None = None,
    ):
        self.config = model.config.resolved()
        self.config.check_predicts("generation")
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_positions = self.config.max_position_embeddings if max_positions is None else max_positions
        learned = self.config.max_position_embeddings
        if self.config.positions == "learned" and self.max_positions > learned:
            raise UserError(f"max_positions={max_positions}: the model has learned {learned}")
        self.buckets = tuple(buckets) if buckets is not None else default_buckets(self.max_positions)
        self.chunk = chunk
        plan = plan or getattr(model, "plan", None)
        leaf = jax.tree.leaves(model.params)[0]
        self.dtype = str(jnp.dtype(dtype or (leaf.dtype if plan is None else plan.compute_dtype)))
        self.plan = plan and replace(plan, compute_dtype=jnp.dtype(self.dtype))
        ends = set() if tokenizer is None else {tokenizer.eos_id, tokenizer.end_of_turn_id}
        self.stop_ids = sorted(ends | set(stop_ids))
        self._adapted = model if isinstance(model, AdaptedModel) else None
        self.decoder = decoding_decoder(self.config) if self._adapted is None else self._adapted.all.unrolled()
        self._stacked = model.decoder
        self.update_params(model.params)

    def update_params(self, params: Mapping[str, Any]) -> None:
        """Takes other weights of the same architecture and grouping; nothing is compiled again."""
        with use(self.plan):
            self.params = _unstack_as(params, decoder=self._stacked, to=self.decoder, dtype=self.dtype)

    def params_of(self, choices: Sequence[tuple[float, ...]]) -> dict[str, Any]:
        """Parameters for a batch whose rows have these adapters (see `Row`; an empty one means none where others
        choose)."""
        chosen = next((choice for choice in choices if choice), None)
        if chosen is None:
            return self.params
        assert self._adapted is not None
        matrix = np.array([choice or [0.0] * len(chosen) for choice in choices], np.float32)
        with use(self.plan):
            scales = _unstacked_scales(matrix, adapters=self._adapted.all)
        return unflatten({**flatten(self.params), **flatten(scales)})

    def cache_bytes(self, prompt_lengths: Sequence[int], params: SamplingParams) -> tuple[int, int]:
        """Bytes of cache per token, as long as every window has room, and of the caches of a call with these prompts
        at the most, states among them."""
        batch = self.batch_size(len(prompt_lengths) * params.n)
        length = self._cache_len(max(prompt_lengths), params.max_tokens)
        return cache_bytes(self.config, self.dtype).per_token, total_bytes(self.config, batch, length, self.dtype)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        adapters: Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts, the n samples of a prompt one after the other.

        `adapters`: by prompt the name of its adapter, or None for the model alone; without, all prompts have all of
        the model's adapters, added up.

        Raises UserError for prompts and parameters out of range (see `make_rows`), for stop strings without a
        tokenizer, and for adapters as an `AdaptedModel` does; RunError when the model's logits are not finite.
        """
        return sorted(self.completions(prompts, params, adapters), key=lambda done: (done.prompt, done.sample))

    def completions(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        adapters: Sequence[str | None] | None = None,
    ) -> Iterator[Completion]:
        """The same as they are done: longest prompts first, and of a batch those that end first."""
        for out in self._outputs(self.rows(prompts, params, adapters), self.chunk, live=False):
            if out.reason is not None:
                row, tracker = out.row, out.tracker
                yield Completion(
                    row.prompt, row.sample, tracker.tokens, tracker.text, out.reason, out.logprobs, out.top_logprobs
                )

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        every: int = 4,
        adapters: Sequence[str | None] | None = None,
    ) -> Iterator[Delta]:
        """The same outputs piece by piece, a look at them every so many tokens; the pieces add up to `generate`'s.

        A piece of text holds whole characters, and nothing that a stop string might still take back; tokens come
        when they are drawn, those behind a stop string excepted.
        """
        rows = self.rows(prompts, params, adapters)
        yield from deltas(self._outputs(rows, min(every, self.chunk), live=True))

    def rows(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        adapters: Sequence[str | None] | None = None,
    ) -> list[Row]:
        """The call's rows, checked. Raises UserError as `generate`."""
        vocab_size = self.config.vocab_size
        assert vocab_size is not None
        choices: list[tuple[float, ...]] = [()] * len(prompts)
        if adapters is not None:
            if self._adapted is None:
                raise UserError("adapters are named for a model that has none")
            choices = [tuple(row) for row in self._adapted.choice(adapters, len(prompts)).tolist()]
        rows = make_rows(prompts, params, choices, max_positions=self.max_positions, vocab_size=vocab_size)
        if self.tokenizer is None and any(row.params.stop for row in rows):
            raise UserError("stop strings need a tokenizer")
        return rows

    def batch_size(self, rows: int) -> int:
        """Rows of a batch: a power of two that holds them, at most `max_batch`, a multiple of the mesh's data axis."""
        size = min(1 << (rows - 1).bit_length(), self.max_batch)
        data = 1 if self.plan is None else self.plan.mesh.shape["data"]
        return -(-size // data) * data

    def parts(self, size: int) -> int:
        """Parts of a batch that are decoded side by side: on one CPU device two, else the batch as it is.

        XLA runs a step's operations one after another, and most are too small for more than one core of a CPU. More
        parts would read the weights from memory more often.
        """
        devices = 1 if self.plan is None else self.plan.mesh.size
        return min(2, os.cpu_count() or 1, size) if devices == 1 and target_platform() == "cpu" else 1

    def bucket(self, length: int) -> int:
        """The length that one of so many tokens is rounded up to."""
        return next((size for size in self.buckets if size >= length), self.max_positions)

    def _cache_len(self, prompt_length: int, max_new: int) -> int:
        room = min(prompt_length + max_new, self.max_positions)
        return max(self.bucket(room), self.bucket(prompt_length))

    def _outputs(self, rows: list[Row], every: int, live: bool) -> Iterator[Output]:
        """Rows with what is new of them as batches are decoded; `live`: text too."""
        size = self.batch_size(len(rows))
        # Longest first, so that prompts of a batch are alike, and a batch that does not fit fails at once.
        ordered = sorted(rows, key=lambda row: -len(row.ids))
        shape = (0, 0)
        part = -(-size // self.parts(size))
        for first in range(0, len(ordered), size):
            batch = ordered[first : first + size]
            shape = self.shape(batch, shape)
            parts = [Batch(self, batch[i : i + part], part, *shape) for i in range(0, len(batch), part)]
            if len(parts) == 1:
                yield from parts[0].outputs(every, live)
            else:
                for i, drawn in in_parallel([each.chunks(every) for each in parts]):
                    yield from parts[i].take(drawn, live)

    def shape(self, batch: list[Row], before: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Buckets of prompts and caches; those of the batch before where smaller ones would not halve them.

        Another shape is another program, and compiling it takes longer than what it saves.
        """
        own = (
            self.bucket(max(len(row.ids) for row in batch)),
            max(self._cache_len(len(row.ids), row.max_new) for row in batch),
        )
        prompt, slots = (b if a <= b < 2 * a else a for a, b in zip(own, before))
        return prompt, max(prompt, slots)


def deltas(outputs: Iterator[Output]) -> Iterator[Delta]:
    """What is new at each look at a row."""
    shown: dict[int, int] = {}
    for out in outputs:
        row, tokens = out.row, out.tracker.tokens
        at = shown.get(id(row), 0)
        shown[id(row)] = len(tokens)
        news = (tokens[at:], out.text, out.logprobs[at : len(tokens)], out.reason)
        yield Delta(row.prompt, row.sample, *news, out.top_logprobs[at : len(tokens)])


@partial(jax.jit, static_argnames="adapters")
def _unstacked_scales(choice: Float[Array, "B K"], *, adapters: Adapters) -> dict[str, Any]:
    return unstack(unflatten(adapters.scales(choice)), adapters.decoder)


@partial(jax.jit, static_argnames=("decoder", "to", "dtype"))
def _unstack_as(params: Mapping[str, Any], *, decoder: Decoder, to: Decoder, dtype: str) -> dict[str, Any]:
    axes = jax.tree.map(lambda declared: declared.axes, declarations(to))

    def cast(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return x.astype(dtype_in_use(axes, dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    out = jax.tree.map(cast, unstack(params, decoder), axes)
    # What ZeRO stores cut over the mesh is gathered here, once, and not at every token.
    return out if current_plan() is None else compute_weights(out, axes)
