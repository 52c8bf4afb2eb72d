"""Objectives as the training step takes them: rows in, sums of named terms and of metrics out.

Metrics carry TRL 1.16's names and are averaged over what TRL averages them over, each a (sum, weight) pair that is
added over microbatches and devices before the one division. Roles: the trained model is `policy`, a frozen reference
`ref`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.jobs import balancing
from llm_jax.jobs.regularization import NONE, Regularization
from llm_jax.jobs.scoring import answer_logps, score_rows, sum_by_answer, target_counts
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import bind
from llm_jax.objectives import dpo, sft
from llm_jax.training.terms import Objective, Pairs, Params, Rows

Sums = tuple[dict[str, Array], Pairs]


def sft_objective(decoder: Decoder, extra: Regularization = NONE, sources: Sequence[str] = ()) -> Objective:
    """Mean negative log-likelihood over the target tokens of the whole batch (pretraining's: of all tokens).

    `extra` adds noise and the terms `z_loss` and those of `Balancing`. Metrics: `entropy` and `mean_token_accuracy`
    over target tokens, `num_tokens` (all but padding) as a count; `loss_NAME` over the target tokens of each of several
    `sources` (by `source_id`); of a model with experts those of `balancing.summary`.
    """

    def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Array) -> Sums:
        del frozen
        outputs = ("logps", "entropy", "is_top1", *extra.outputs)
        noise = extra.decoder_arguments(decoder, key, rows)
        policy = bind(decoder, params["policy"])
        scores, mask = score_rows(policy, rows, outputs, further=extra.depth > 0, **noise)
        losses, metrics = sft(scores["logps"], mask, scores["entropy"], scores["is_top1"])
        targets = mask.sum().astype(jnp.float32)
        averaged = {name: (values.sum(), targets) for name, values in metrics.items()}
        own = source_losses(rows, losses, mask, sources)
        return {"nll": losses.sum()} | extra.terms(scores, statistics), averaged | token_count(rows) | routing(
            scores
        ) | own

    def weights(batch: Rows) -> dict[str, Array]:
        return {"nll": target_counts(batch).astype(jnp.float32)} | extra.weights(batch)

    coefficients = {"nll": 1.0} | extra.coefficients
    return Objective(terms, weights, coefficients, sparse=source_metrics(sources), **extra.of_objective(decoder))


def dpo_objective(
    decoder: Decoder,
    beta: float,
    label_smoothing: float,
    reference: Literal["stored", "live"],
    extra: Regularization = NONE,
    sources: Sequence[str] = (),
    reference_decoder: Decoder | None = None,
) -> Objective:
    """Mean of `objectives.dpo` over the pairs of the whole batch.

    The reference's log-probabilities are columns of the rows (`stored`: `ref_chosen_logps`, `ref_rejected_logps`,
    float32[B, P]) or computed in the step from the role `ref` of the frozen parameters (`live`), which are of
    `reference_decoder` (None: of the policy's). Absent pairs
    (`pair_index` -1) count for nothing. `extra` adds noise to the policy, and the term `z_loss` over answer tokens.

    Metrics: `rewards/*` and `logps/*` over pairs; `logits/chosen` and `logits/rejected`, the logits' mean over the
    vocabulary, and `entropy` over answer tokens (of both sides); `mean_token_accuracy` over the chosen answers' tokens
    only; `num_tokens` (all but padding, prompts once per side) as a count; `loss_NAME` over the pairs of each of
    several `sources`.
    """

    def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Array) -> Sums:
        outputs = ("logps", "entropy", "mean_logit", "is_top1", *extra.outputs)
        noise = extra.decoder_arguments(decoder, key, rows)
        scores, mask = score_rows(bind(decoder, params["policy"]), rows, outputs, **noise)
        present = rows["pair_index"] >= 0
        chosen_logps, rejected_logps = sum_by_answer(scores["logps"], mask, rows)
        if reference == "live":
            stored = jax.lax.stop_gradient(answer_logps(bind(reference_decoder or decoder, frozen["ref"]), rows))
            ref_chosen, ref_rejected = stored["chosen_logps"], stored["rejected_logps"]
        else:
            ref_chosen, ref_rejected = (
                jnp.where(present, rows[name], 0.0) for name in ("ref_chosen_logps", "ref_rejected_logps")
            )
        losses, metrics = dpo(chosen_logps, rejected_logps, ref_chosen, ref_rejected, beta, label_smoothing)

        def over_pairs(values: Array) -> Array:
            return jnp.where(present, values, 0.0).sum()

        def over_tokens(values: Array, where: Array) -> tuple[Array, Array]:
            values = jax.lax.stop_gradient(values.astype(jnp.float32))
            return jnp.where(where, values, 0.0).sum(), where.sum().astype(jnp.float32)

        pairs = present.sum().astype(jnp.float32)
        chosen, rejected = mask & (rows["side"] == 1), mask & (rows["side"] == 2)
        averaged = {name: (over_pairs(values), pairs) for name, values in metrics.items()} | {
            "entropy": over_tokens(scores["entropy"], chosen | rejected),
            "mean_token_accuracy": over_tokens(scores["is_top1"], chosen),
            "logits/chosen": over_tokens(scores["mean_logit"], chosen),
            "logits/rejected": over_tokens(scores["mean_logit"], rejected),
        }
        own = source_losses(rows, losses, present, sources)
        return {"dpo": over_pairs(losses)} | extra.terms(scores, statistics), averaged | token_count(rows) | routing(
            scores
        ) | own

    def weights(batch: Rows) -> dict[str, Array]:
        return {"dpo": (batch["pair_index"] >= 0).sum().astype(jnp.float32)} | extra.weights(batch)

    coefficients = {"dpo": 1.0} | extra.coefficients
    return Objective(terms, weights, coefficients, sparse=source_metrics(sources), **extra.of_objective(decoder))


def routing(scores: Mapping[str, Any]) -> Pairs:
    """What the routers of a model with experts report, for `balancing.summary`."""
    return balancing.metrics(scores["experts"]) if "experts" in scores else {}


def source_metrics(sources: Sequence[str]) -> tuple[str, ...]:
    """The names of per-source losses; of a single source there is none, since it would be the loss."""
    return tuple(f"loss_{name}" for name in sources) if len(sources) > 1 else ()


def source_losses(rows: Rows, losses: Array, where: Array, sources: Sequence[str]) -> Pairs:
    """`loss_NAME` of each source: losses [n, m] where `where`, and how many, of the rows with its `source_id`."""
    sums = jnp.where(where, jax.lax.stop_gradient(losses), 0.0).sum(-1)
    counts = where.sum(-1).astype(jnp.float32)
    own = {name: rows["source_id"] == number for number, name in enumerate(source_metrics(sources))}
    return {name: (jnp.where(mine, sums, 0.0).sum(), jnp.where(mine, counts, 0.0).sum()) for name, mine in own.items()}


def token_count(rows: Rows) -> Pairs:
    """`num_tokens`: tokens that are not padding. Its weight is 0, the mark of a count: summed and never divided."""
    return {"num_tokens": ((rows["segment_ids"] != 0).sum().astype(jnp.float32), jnp.zeros((), jnp.float32))}
