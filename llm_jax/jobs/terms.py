"""Objectives as the training step takes them: rows in, sums of named terms and of metrics out.

Metrics carry TRL 1.16's names and are averaged over what TRL averages them over, each a (sum, weight) pair that is
added over microbatches and devices before the one division. Roles: the trained model is `policy`, a frozen reference
`ref`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.jobs import balancing
from llm_jax.jobs.regularization import NONE, Regularization
from llm_jax.jobs.scoring import score_rows, target_counts
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import bind
from llm_jax.objectives import sft
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
        own = source_values(rows, losses, mask, sources)
        return {"nll": losses.sum()} | extra.terms(scores, statistics), averaged | token_count(rows) | routing(
            scores
        ) | own

    def weights(batch: Rows) -> dict[str, Array]:
        return {"nll": target_counts(batch).astype(jnp.float32)} | extra.weights(batch)

    coefficients = {"nll": 1.0} | extra.coefficients
    return Objective(terms, weights, coefficients, sparse=source_metrics(sources), **extra.of_objective(decoder))


def routing(scores: Mapping[str, Any]) -> Pairs:
    """What the routers of a model with experts report, for `balancing.summary`."""
    return balancing.metrics(scores["experts"]) if "experts" in scores else {}


def source_metrics(sources: Sequence[str], what: str = "loss") -> tuple[str, ...]:
    """The names of per-source losses, or of `what`; of a single source there is none, since it would be the whole's."""
    return tuple(f"{what}_{name}" for name in sources) if len(sources) > 1 else ()


def source_values(rows: Rows, values: Array, where: Array, sources: Sequence[str], what: str = "loss") -> Pairs:
    """`loss_NAME` of each source: values [n, m] where `where`, and how many, of the rows with its `source_id`."""
    sums = jnp.where(where, jax.lax.stop_gradient(values), 0.0).sum(-1)
    counts = where.sum(-1).astype(jnp.float32)
    own = {name: rows["source_id"] == number for number, name in enumerate(source_metrics(sources, what))}
    return {name: (jnp.where(mine, sums, 0.0).sum(), jnp.where(mine, counts, 0.0).sum()) for name, mine in own.items()}


def over_tokens(values: Array, where: Array) -> tuple[Array, Array]:
    """A metric's sum over the positions `where`, and how many they are."""
    values = jax.lax.stop_gradient(values.astype(jnp.float32))
    return jnp.where(where, values, 0.0).sum(), where.sum().astype(jnp.float32)


def token_count(rows: Rows) -> Pairs:
    """`num_tokens`: tokens that are not padding. Its weight is 0, the mark of a count: summed and never divided."""
    return {"num_tokens": ((rows["segment_ids"] != 0).sum().astype(jnp.float32), jnp.zeros((), jnp.float32))}
