"""What reward models learn, as the training step takes it: packed rows in, sums of terms and of metrics out.

Each answer is a segment of its row and is scored at its last token (or by the mean of its tokens), all of a row in one
forward pass. Metrics carry TRL's names.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax import objectives
from llm_jax.jobs.regularization import NONE, Regularization
from llm_jax.jobs.scoring import run_rows
from llm_jax.jobs.terms import Sums, routing, source_metrics, source_values, token_count
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import bind
from llm_jax.training.terms import Objective, Pairs, Params, Rows

EXTREMES: dict[str, Literal["min", "max"]] = {"min_reward": "min", "max_reward": "max"}
F1 = "f1/"
"""Begins what `summary` makes `f1` of."""


def pairs_objective(
    decoder: Decoder,
    center_rewards_coefficient: float | None = None,
    pad_id: int | None = None,
    extra: Regularization = NONE,
    sources: Sequence[str] = (),
) -> Objective:
    """Mean of `objectives.bradley_terry` over the pairs of the whole batch.

    A pair's `margin` and `weight`, where rows have them, are inside of σ and before the loss. Absent pairs
    (`pair_index` -1) count for nothing. Metrics, TRL's: `accuracy`, `margin`, `mean_reward` over pairs, `min_reward`
    and `max_reward` the least and the largest of the batch, `num_tokens`; `loss_NAME` of each of several `sources`.
    """

    def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Array) -> Sums:
        del frozen
        present = rows["pair_index"] >= 0
        scores, routers = _scores(decoder, params, rows, key, extra, pad_id, documents=2 * present.shape[-1])
        both = scores[..., 0].reshape(*present.shape, 2)
        margin = jnp.nan_to_num(rows["margin"], nan=0.0) if "margin" in rows else 0.0
        losses, metrics = objectives.bradley_terry(both[..., 0], both[..., 1], margin, center_rewards_coefficient)
        if "weight" in rows:
            losses = losses * rows["weight"]
        return _sums("bradley_terry", losses, metrics, present, rows, sources, extra, routers, statistics)

    def weights(batch: Rows) -> dict[str, Array]:
        return {"bradley_terry": (batch["pair_index"] >= 0).sum().astype(jnp.float32)} | extra.weights(batch)

    return Objective(
        terms,
        weights,
        {"bradley_terry": 1.0} | extra.coefficients,
        sparse=source_metrics(sources),
        extremes=EXTREMES,
        **extra.of_objective(decoder),
    )


def rankings_objective(
    decoder: Decoder,
    loss: Literal["all_pairs", "plackett_luce"],
    pad_id: int | None = None,
    extra: Regularization = NONE,
    sources: Sequence[str] = (),
) -> Objective:
    """Mean of `objectives.ranked_pairs` or `objectives.plackett_luce` over the rankings of the whole batch.

    So a ranking of nine counts as much as one of two, as in InstructGPT, where all pairs of a prompt are one element of
    the batch. Metrics as of pairs, each the mean over a ranking's pairs or answers.
    """
    function = objectives.ranked_pairs if loss == "all_pairs" else objectives.plackett_luce

    def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Array) -> Sums:
        del frozen
        present, of = rows["ranking_index"] >= 0, rows["ranking_id"]
        scores, routers = _scores(decoder, params, rows, key, extra, pad_id, documents=of.shape[-1])
        # Every ranking sees all answers of its row, its own marked: they stand in order.
        own = of[:, None, :] == jnp.arange(1, present.shape[-1] + 1, dtype=jnp.int32)[:, None]
        rewards = jnp.broadcast_to(scores[..., 0][:, None, :], own.shape)
        losses, metrics = function(rewards, own)
        return _sums(loss, losses, metrics, present, rows, sources, extra, routers, statistics)

    def weights(batch: Rows) -> dict[str, Array]:
        return {loss: (batch["ranking_index"] >= 0).sum().astype(jnp.float32)} | extra.weights(batch)

    return Objective(
        terms,
        weights,
        {loss: 1.0} | extra.coefficients,
        sparse=source_metrics(sources),
        extremes=EXTREMES,
        **extra.of_objective(decoder),
    )


def classes_objective(
    decoder: Decoder,
    steps: bool,
    pad_id: int | None = None,
    extra: Regularization = NONE,
    sources: Sequence[str] = (),
) -> Objective:
    """Mean cross-entropy over the texts of the whole batch, or over the `steps` of its answers.

    As transformers' and TRL's PRMTrainer, steps of all answers alike. Metrics: `accuracy`, and `f1`, the mean over the
    classes that occur, as label or as guess, of 2 TP / (2 TP + FP + FN) (scikit-learn's macro average).
    """

    def labels_of(rows: Rows) -> tuple[Int[Array, "*batch n"], Bool[Array, "*batch n"]]:
        return (rows["step_label"], rows["step_label"] >= 0) if steps else (rows["label"], rows["answer_index"] >= 0)

    def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Array) -> Sums:
        del frozen
        labels, present = labels_of(rows)
        scores, routers = _scores(decoder, params, rows, key, extra, pad_id, documents=labels.shape[-1])
        classes = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        is_label = labels[..., None] == classes
        logps = jax.nn.log_softmax(scores, axis=-1)
        losses = -jnp.where(is_label, logps, 0.0).sum(-1)
        is_guess = jax.lax.stop_gradient(scores).argmax(-1)[..., None] == classes
        metrics = {"accuracy": (is_label & is_guess).any(-1).astype(jnp.float32)}
        sums, averaged = _sums("nll", losses, metrics, present, rows, sources, extra, routers, statistics)
        counted = present[..., None]
        found = {"both": is_label & is_guess, "label": is_label, "guess": is_guess}
        counts = {
            F1 + name: ((where & counted).sum(range(where.ndim - 1)).astype(jnp.float32), jnp.zeros(()))
            for name, where in found.items()
        }
        return sums, averaged | counts

    def weights(batch: Rows) -> dict[str, Array]:
        return {"nll": labels_of(batch)[1].sum().astype(jnp.float32)} | extra.weights(batch)

    own = extra.of_objective(decoder)
    inner = own.pop("summary", None)

    def summary(pairs: Pairs) -> Pairs:
        rest = {name: pair for name, pair in pairs.items() if not name.startswith(F1)}
        rest = rest if inner is None else inner(rest)
        return rest | {"f1": (macro_f1(*(pairs[F1 + name][0] for name in ("both", "label", "guess"))), jnp.float32(1))}

    return Objective(
        terms,
        weights,
        {"nll": 1.0} | extra.coefficients,
        summary=summary,
        sparse=source_metrics(sources),
        **own,
    )


def macro_f1(both: Float[Array, "n"], label: Float[Array, "n"], guess: Float[Array, "n"]) -> Float[Array, ""]:
    """From how often each class is both label and guess, label, and guess: 2 TP / (labels + guesses), averaged over the
    classes that occur as either; 0 where none does."""
    occurs = label + guess
    return (2 * both / jnp.maximum(occurs, 1.0)).sum() / jnp.maximum((occurs > 0).sum(), 1)


def scored_segments(
    tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], pooling: str, pad_id: int | None
) -> Int[Array, "B T"]:
    """Segments as scores are pooled from them: a text's last token is the last one that is not `pad_id`, as in
    transformers and TRL. It matters for tokenizers that pad with their end token: the token before it is read."""
    return segment_ids if pad_id is None or pooling != "last" else jnp.where(tokens == pad_id, 0, segment_ids)


def _scores(
    decoder: Decoder,
    params: Params,
    rows: Rows,
    key: Array,
    extra: Regularization,
    pad_id: int | None,
    documents: int,
) -> tuple[Float[Array, "B n labels"], dict[str, Any]]:
    """Of the row's documents, or of each token where the head says so; and what routers report."""
    policy = bind(decoder, params["policy"])
    hidden, _, routers = run_rows(policy, rows, **extra.decoder_arguments(decoder, key, rows))
    segments = scored_segments(rows["tokens"], rows["segment_ids"], decoder.config.head.pooling, pad_id)
    return policy.scores(hidden, segments, documents), {"experts": routers} if routers else {}


def _sums(
    name: str,
    losses: Float[Array, "B n"],
    metrics: dict[str, Float[Array, "B n"]],
    present: Bool[Array, "B n"],
    rows: Rows,
    sources: Sequence[str],
    extra: Regularization,
    routers: dict[str, Any],
    statistics: Any,
) -> Sums:
    """Sums over what is there; the extremes of what is one."""
    count, none = present.sum().astype(jnp.float32), jnp.zeros((), jnp.float32)
    averaged: Pairs = {}
    for metric, values in metrics.items():
        if metric in EXTREMES:
            far = jnp.inf if EXTREMES[metric] == "min" else -jnp.inf
            extreme = jnp.min if EXTREMES[metric] == "min" else jnp.max
            averaged[metric] = extreme(jnp.where(present, values, far)), none
        else:
            averaged[metric] = jnp.where(present, values, 0.0).sum(), count
    averaged |= token_count(rows) | routing(routers) | source_values(rows, losses, present, sources)
    return {name: jnp.where(present, losses, 0.0).sum()} | extra.terms(routers, statistics), averaged
