"""Losses on unpaired answers as the training step takes them: packed answers in, sums of terms and of metrics out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax import objectives
from llm_jax.jobs import running
from llm_jax.jobs.first_pass import split_statistics, with_first_pass
from llm_jax.jobs.paired import SIDES, Reference
from llm_jax.jobs.preference_loss import PreferenceLoss
from llm_jax.jobs.regularization import NONE, Regularization
from llm_jax.jobs.scoring import mismatched_logps, of_segment, score_rows, sum_by_segment, unpaired_logps
from llm_jax.jobs.terms import Sums, over_tokens, routing, source_metrics, source_values, token_count
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import bind
from llm_jax.objectives.preference.bco_unpaired import Running
from llm_jax.training.terms import Objective, Pairs, Params, Rows, per_unit

SIDED = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")


def unpaired_objective(
    decoder: Decoder,
    loss: PreferenceLoss,
    reference: Reference = "stored",
    extra: Regularization = NONE,
    sources: Sequence[str] = (),
    reference_decoder: Decoder | None = None,
) -> Objective:
    """Weighted sum of losses, each a mean over the answers of the whole batch, desirable and undesirable together.

    The reference's log-probabilities are columns of the rows (`stored`: `ref_logps`, and `ref_kl_logps` where a loss
    takes KTO's z; float32[B, P]) or computed in the step (`live`), by `reference_decoder` (None: the
    policy's). Absent answers (`answer_index` -1) count for nothing. An answer's `weight` multiplies its losses; the
    mean is over answers all the same.

    KTO's z comes from the first pass: the mean, over all answers of the global batch, of log π - log π_ref of the
    mismatched answers beside them (`data/mismatching.py`), at least 0. So it is the same for any number of microbatches
    and devices, where TRL takes it of each microbatch (a mean over its devices' means).

    Metrics under TRL's names: `rewards/chosen`, `logps/chosen` and `logits/chosen` over desirable answers (or their
    tokens) and `…/rejected` over undesirable ones, left out where there are none; `rewards/margins`, the difference of
    both means, 0 where one is missing; `kl`, KTO's z; `entropy` over answer tokens; `num_tokens` as a count, of the
    answers with their prompts and, as in TRL, not of the mismatched ones. Beside TRL's: `implicit_kl`, `probs/…` and
    `lengths/…` as for pairs; `loss_NAME` over the answers of each of several `sources`.
    """
    outputs = ("logps", "entropy", "mean_logit", *extra.outputs)
    z = "kl" in loss.statistics

    def reference_logps(frozen: Params, rows: Rows) -> dict[str, Array]:
        if reference == "live":
            said = unpaired_logps(bind(reference_decoder or decoder, frozen["ref"]), rows)
            return jax.lax.stop_gradient({f"ref_{name}": value for name, value in said.items()})
        present = rows["answer_index"] >= 0
        names = ("ref_logps", "ref_kl_logps") if z else ("ref_logps",)
        return {name: jnp.where(present, rows[name], 0.0) for name in names}

    def first_pass(params: Params, frozen: Params, rows: Rows, key: Array) -> dict[str, Array]:
        found = {"present": rows["answer_index"] >= 0}
        said = reference_logps(frozen, rows)
        if z:
            found["kl_logps"] = mismatched_logps(bind(decoder, params["policy"]), rows)
            found["ref_kl_logps"] = said["ref_kl_logps"]
        if "delta" in loss.statistics:
            found |= {"logps": policy_logps(params, rows, key)[2], "ref_logps": said["ref_logps"]}
            found["labels"] = rows["label"] != 0
        return found

    def policy_logps(params: Params, rows: Rows, key: Array) -> tuple[dict[str, Any], Array, Array]:
        """Scores of tokens, where they count, and the answers' sums."""
        noise = extra.decoder_arguments(decoder, key, rows)
        scores, mask = score_rows(bind(decoder, params["policy"]), rows, outputs, **noise)
        return scores, mask, sum_by_segment(scores["logps"], mask, rows["segment_ids"], rows["label"].shape[-1])

    def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Array) -> Sums:
        scores, mask, logps = policy_logps(params, rows, key)
        ref_logps = reference_logps(frozen, rows)["ref_logps"]
        present, labels = rows["answer_index"] >= 0, rows["label"] != 0
        of_batch, of_routers = split_statistics(statistics, bool(loss.statistics))
        known = {"logps": logps, "ref_logps": ref_logps, "labels": labels, "present": present}
        known = known if of_batch is None else of_batch.everything
        before = running.so_far(params) if loss.running_delta else None
        found = {name: statistic(name, known, loss.beta, before) for name in loss.statistics}
        sums, losses, metrics = {}, jnp.zeros_like(logps), {}
        for term in loss.terms:
            needed = term.named.statistics
            given = {} if needed is None else {needed: found[needed]}
            values, said = term.function(logps, ref_logps, labels, **given, **term.arguments)
            values = values * rows["weight"] if "weight" in rows else values
            sums[term.name] = jnp.where(present, values, 0.0).sum()
            losses, metrics = losses + term.factor * values, said | metrics
        averaged = _by_label(metrics, present, labels) | _watched(logps, ref_logps, mask, rows, present, labels)
        if loss.running_delta:
            rewards = loss.beta * (logps - ref_logps)
            averaged |= running.sums(
                dict.fromkeys(SIDES, rewards), {"chosen": present & labels, "rejected": present & ~labels}
            )
        averaged |= {"entropy": over_tokens(scores["entropy"], mask)}
        desirable = mask & of_segment(labels, rows["segment_ids"])
        averaged["logits/chosen"] = over_tokens(scores["mean_logit"], desirable)
        averaged["logits/rejected"] = over_tokens(scores["mean_logit"], mask & ~desirable)
        averaged |= token_count(rows) | routing(scores) | source_values(rows, losses, present, sources)
        return sums | extra.terms(scores, of_routers), averaged

    def weights(batch: Rows) -> dict[str, Array]:
        answers = (batch["answer_index"] >= 0).sum().astype(jnp.float32)
        return {term.name: answers for term in loss.terms} | extra.weights(batch)

    further = with_first_pass(extra.of_objective(decoder), first_pass if loss.statistics else None, of_one=z)
    further["summary"] = _with_margins(further.get("summary"))
    objective = Objective(
        terms,
        weights,
        {term.name: term.factor for term in loss.terms} | extra.coefficients,
        sparse=(*SIDED, *source_metrics(sources)),
        **further,
    )
    return running.carrying(objective) if loss.running_delta else objective


def statistic(name: str, whole: Mapping[str, Array], beta: float, before: Running | None) -> Array:
    """A statistic of the whole batch, and of those `before`."""
    if name == "kl":
        return objectives.kto_kl(whole["kl_logps"], whole["ref_kl_logps"], whole["present"])
    return objectives.bco_delta(whole["logps"], whole["ref_logps"], whole["labels"], beta, whole["present"], before)[0]


def _by_label(metrics: dict[str, Array], present: Array, labels: Array) -> Pairs:
    """Each metric over the answers it is of, by its name's last part."""
    of = {"chosen": present & labels, "rejected": present & ~labels}
    found = {}
    for name, values in metrics.items():
        where = of.get(name.rpartition("/")[2], present)
        found[name] = (jnp.where(where, values, 0.0).sum(), where.sum().astype(jnp.float32))
    return found


def _watched(logps: Array, ref_logps: Array, mask: Array, rows: Rows, present: Array, labels: Array) -> Pairs:
    """Metrics beside TRL's."""
    lengths = sum_by_segment(mask.astype(jnp.float32), mask, rows["segment_ids"], labels.shape[-1])
    logps = jax.lax.stop_gradient(logps)
    probs = jnp.exp(logps / jnp.maximum(lengths, 1.0))
    sided = {f"{name}/{side}": x for name, x in (("probs", probs), ("lengths", lengths)) for side in SIDES}
    return _by_label({"implicit_kl": logps - ref_logps} | sided, present, labels)


def _with_margins(summary: Callable[[Pairs], Pairs] | None) -> Callable[[Pairs], Pairs]:
    """Adds `rewards/margins`, a difference of two means."""

    def reported(pairs: Pairs) -> Pairs:
        pairs = pairs if summary is None else summary(pairs)
        if "rewards/chosen" not in pairs or "rewards/rejected" not in pairs:
            return pairs
        (chosen, desirable), (rejected, undesirable) = pairs["rewards/chosen"], pairs["rewards/rejected"]
        both = (desirable > 0) & (undesirable > 0)
        margin = jnp.where(both, chosen * per_unit(desirable) - rejected * per_unit(undesirable), 0.0)
        return pairs | {"rewards/margins": (margin, jnp.ones(()))}

    return reported
