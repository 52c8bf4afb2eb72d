"""Fixed batches for tests: documents and pairs laid into windows by hand, and what an objective makes of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from llm_jax.base.trees import flatten
from llm_jax.training.terms import Objective, divide_pairs, total_loss


class Document(NamedTuple):
    tokens: ArrayLike
    loss_mask: ArrayLike
    """1 for each token that is a target itself."""


class Pair(NamedTuple):
    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


def document_rows(rows: Sequence[Sequence[Document]], window: int) -> dict[str, Any]:
    """LM rows: the documents of each row one after another, then padding."""
    names = ("tokens", "segment_ids", "positions", "loss_mask")
    out: dict[str, Any] = {name: np.zeros((len(rows), window), np.int32) for name in names}
    for r, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, 1):
            stop = start + np.size(document.tokens)
            assert stop <= window
            out["tokens"][r, start:stop] = document.tokens
            out["segment_ids"][r, start:stop] = segment
            out["positions"][r, start:stop] = np.arange(stop - start)
            out["loss_mask"][r, start:stop] = document.loss_mask
            start = stop
    out["loss_mask"] = out["loss_mask"].astype(np.uint8)
    return out


def pair_rows(rows: Sequence[Sequence[Pair]], window: int, most_pairs: int) -> dict[str, Any]:
    """Pair rows: each answer its own segment behind its copy of the prompt; pairs are numbered in order, from 0."""

    def answer(pair: Pair, answer: Sequence[int]) -> Document:
        return Document([*pair.prompt, *answer], [0] * len(pair.prompt) + [1] * len(answer))

    answers = [[answer(p, ids) for p in pairs for ids in (p.chosen, p.rejected)] for pairs in rows]
    out = document_rows(answers, window)
    segments = out["segment_ids"]
    out["pair_id"] = (segments + 1) // 2
    out["side"] = np.where(segments == 0, 0, 2 - segments % 2).astype(np.int32)
    out["pair_index"] = np.full((len(rows), most_pairs), -1, np.int32)
    number = 0
    for r, pairs in enumerate(rows):
        out["pair_index"][r, : len(pairs)] = number + np.arange(len(pairs))
        number += len(pairs)
    return out


def evaluate(objective: Objective, params: Mapping, frozen: Mapping, rows: Mapping) -> tuple[Any, dict, dict]:
    """Loss, metrics and gradients (by path) of one batch as one microbatch."""

    def loss(params: Mapping) -> tuple[Any, dict]:
        sums, metrics = objective.terms({"policy": params}, frozen, rows, None, jax.random.key(0))
        weights = objective.weights({name: values[None] for name, values in rows.items()})
        return total_loss(objective, sums, weights), divide_pairs(metrics, objective.coefficients)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, {name: value for name, value in metrics.items() if name != "loss"}, flatten(grads)
