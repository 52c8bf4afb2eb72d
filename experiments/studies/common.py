"""What the studies share: real text, a training loop in one process, numbers over seeds, tables.

The text is that of configs/pretrain.py, the standard library's sources: documents of `stdlib_text`, whole modules held
out. Two arms differ where their seeds' ranges are apart; otherwise the seeds' spread is larger than the difference. Of
three seeds each, arms that are equal are apart in one case of ten.
"""

import argparse
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.base.runtime import prepare_runtime
from llm_jax.data.embedded import stdlib_text
from llm_jax.data.encode import Sequence as TokenSequence
from llm_jax.data.packing import cut_every
from llm_jax.data.rows import fill_row, lm_schema
from llm_jax.data.tokenizer_training import train_bpe
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.jobs.regularization import regularization
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, ModelConfig, abstract_params, declarations, init_params
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import (
    OptimizerConfig,
    TrainConfig,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    weights_in_use,
)
from llm_jax.training import evaluate as summed_up
from llm_jax.training.config import BalancingConfig

Rows = dict[str, np.ndarray]
COLUMNS = ("tokens", "segment_ids", "positions", "loss_mask")


class Text(NamedTuple):
    """Documents as ids, with an end token each."""

    tokenizer: Tokenizer
    train: list[list[int]]
    held_out: list[list[int]]


@functools.cache
def text(vocab_size: int, characters: int) -> Text:
    """About so many characters to train on, and a tenth of them held out; the tokenizer sees the former only."""

    def some(split: stdlib_text.Split, wanted: int) -> list[str]:
        documents = stdlib_text.documents(split)
        sizes = itertools.accumulate(len(document.text) for document in documents)
        return [document.text for document, size in zip(documents, sizes) if size <= wanted] or [
            documents[0].text[:wanted]
        ]

    train = some("train", characters)
    tokenizer = train_bpe(train, vocab_size)

    def encoded(texts: list[str]) -> list[list[int]]:
        return [tokenizer.encode(one) + [tokenizer.eos_id] for one in texts]

    return Text(tokenizer, encoded(train), encoded(some("eval", characters // 10)))


def stacked(tokenizer: Tokenizer, window: int, packed: Iterable[Sequence[TokenSequence]]) -> Rows:
    """Sequences of each row -> arrays [rows, window]."""
    filled = [fill_row(lm_schema(window), row, tokenizer.token_bytes, tokenizer.pad_id, 0) for row in packed]
    return {name: np.stack([row[name] for row in filled]) for name in COLUMNS}


def packed_rows(tokenizer: Tokenizer, documents: list[list[int]], window: int) -> Rows:
    """Documents in a line, cut every `window` tokens; the last row, which is not full, is left out."""
    pieces = list(cut_every([len(ids) for ids in documents], window))
    pieces = pieces[:-1] or pieces
    return stacked(
        tokenizer,
        window,
        (
            [
                TokenSequence(np.array(documents[i][start:stop], np.int32), np.ones(stop - start, np.uint8))
                for i, start, stop in row
            ]
            for row in pieces
        ),
    )


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, warm-up over a tenth, cosine to a tenth, decay 0.1."""

    steps: int
    batch: int = 8
    rate: float = 4e-3
    balancing: BalancingConfig = BalancingConfig()
    looks: int = 8
    """Evaluations, evenly spaced, the last one at the end."""


class Look(NamedTuple):
    step: int
    seconds: float
    """Of training alone: neither compiling nor evaluations."""
    loss: float


class Trained(NamedTuple):
    params: dict[str, Any]
    curve: list[Look]
    """Held-out loss, nats per token."""
    metrics: dict[str, float]
    """Means over the last quarter of the steps."""

    @property
    def loss(self) -> float:
        return self.curve[-1].loss


PLAN = functools.cache(lambda: make_plan(MeshConfig(data=1)))


class Trainer:
    """A model and a recipe, compiled once for all seeds."""

    def __init__(self, config: ModelConfig, recipe: Recipe):
        self.decoder, self.recipe = Decoder(config), recipe
        self.declared = {"policy": declarations(self.decoder)}
        train = TrainConfig(balancing=recipe.balancing)
        objective = sft_objective(self.decoder, regularization(train, self.decoder.config))
        options = OptimizerConfig(
            learning_rate=recipe.rate, warmup_steps=recipe.steps // 10, final_fraction=0.1, weight_decay=0.1
        )
        self.optimizer = make_optimizer(options, self.declared, recipe.steps)
        self.step = make_train_step(objective, self.optimizer, PLAN(), self.declared)
        self.compiled = False

    def _state(self, seed: int, params: Any) -> Any:
        params = init_params(self.decoder, seed) if params is None else jax.tree.map(np.asarray, params)
        return init_state({"policy": params}, self.optimizer, self.declared, PLAN())

    def __call__(self, rows: Rows, held_out: Rows, seed: int, params: Any = None) -> Trained:
        """From random weights of the seed, or from `params`; the seed also orders the rows."""
        steps, batch = self.recipe.steps, self.recipe.batch
        order = np.random.default_rng(seed)
        count = len(rows["tokens"])
        places = np.concatenate([order.permutation(count) for _ in range(-(-steps * batch // count))])
        batches = places[: steps * batch].reshape(steps, 1, batch)

        def given(step: int) -> Rows:
            return {name: x[batches[step]] for name, x in rows.items()}

        if not self.compiled:
            jax.block_until_ready(self.step(self._state(seed, params), given(0)))
            self.compiled = True
        state, seconds, curve, kept = self._state(seed, params), 0.0, [], []
        looks = {round(steps * (i + 1) / self.recipe.looks) for i in range(self.recipe.looks)}
        begin = time.perf_counter()
        for step in range(steps):
            state, metrics = self.step(state, given(step))
            if step >= steps - -(-steps // 4):
                kept.append(metrics)
            if step + 1 in looks:
                jax.block_until_ready(state)
                seconds += time.perf_counter() - begin
                loss = evaluate(self.decoder, weights_in_use(state)["policy"], held_out)
                curve.append(Look(step + 1, seconds, loss))
                begin = time.perf_counter()
        kept = jax.device_get(kept)
        metrics = {name: statistics.fmean(float(one[name]) for one in kept) for name in kept[0]}
        return Trained(jax.device_get(weights_in_use(state)["policy"]), curve, metrics)


@functools.cache
def _evaluation(config: ModelConfig) -> tuple[Any, Any]:
    decoder = Decoder(config)
    objective = sft_objective(decoder)
    return objective, make_eval_step(objective, PLAN(), {"policy": declarations(decoder)})


def evaluate(decoder: Decoder, params: Any, rows: Rows, batch: int = 16) -> float:
    """Mean loss over all target tokens of the rows, nats."""
    objective, step = _evaluation(decoder.config)
    state = {"params": {"policy": params}, "model_state": {}, "frozen": {}}
    count = len(rows["tokens"])
    batch = min(batch, count)
    # The last batch is filled up with padding, which has no targets.
    filled = {name: np.concatenate([x, np.zeros((-count % batch, *x.shape[1:]), x.dtype)]) for name, x in rows.items()}
    batches = [{name: x[None, i : i + batch] for name, x in filled.items()} for i in range(0, count, batch)]
    return summed_up(step, objective, state, batches)["loss"]


def count_parameters(config: ModelConfig) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(Decoder(config))))


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and between what the seeds lie."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def compared(values: Sequence[float], others: Sequence[float]) -> str:
    """Of `values` beside `others`: `lower`, `higher`, or `no difference` where the seeds' ranges overlap."""
    if max(values) < min(others):
        return "lower"
    return "higher" if min(values) > max(others) else "no difference"


def changed(differences: Sequence[float]) -> str:
    """Of one model's differences seed by seed: `no difference` where their mean is within the spread around it."""
    middle = mean(differences)
    if abs(middle) <= max(differences) - min(differences):
        return "no difference"
    return "lower" if middle < 0 else "higher"


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(str(value) for value in row)} |" for row in rows)


def say(line: str) -> None:
    """What has just been measured, before all of it is."""
    print(line, file=sys.stderr, flush=True)


def make_parser(doc: str | None, file: str, steps: int | None) -> argparse.ArgumentParser:
    """The flags that all studies have; `steps` None: nothing is trained."""
    prepare_runtime()  # As every command of llm_jax does, …
    # … but too late for jax, which has read the environment.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="random weights and orders of rows, or repeats of timings")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="of each training run")
    parser.add_argument("--scale", choices=("full", "test"), default="full", help="test: seconds, says nothing")
    parser.add_argument("--svg", default=str(Path(file).with_suffix(".svg")), help="where the plot goes")
    return parser
