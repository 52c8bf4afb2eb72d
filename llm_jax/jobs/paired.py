"""Losses on pairs as the training step takes them: packed pairs in, sums of terms and of metrics out."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax import objectives
from llm_jax.jobs import running
from llm_jax.jobs.first_pass import own_rows, split_statistics, with_first_pass
from llm_jax.jobs.preference_loss import SMOOTHED_BY_PAIR, PreferenceLoss, Term
from llm_jax.jobs.regularization import NONE, Regularization
from llm_jax.jobs.scoring import answer_logps, next_tokens, score_rows, sum_by_answer, without_tails
from llm_jax.jobs.terms import Sums, over_tokens, routing, source_metrics, source_values, token_count
from llm_jax.models.decoder import Decoder
from llm_jax.models.mtp import same_document
from llm_jax.models.parameter import bind
from llm_jax.objectives.preference.bco_unpaired import Running
from llm_jax.training.terms import Objective, Params, Rows, Statistics

Reference = Literal["stored", "live", "none"]
SIDES = ("chosen", "rejected")
ACCURACIES = "rewards/accuracies"
LOGPS = ("chosen_logps", "rejected_logps")


def paired_objective(
    decoder: Decoder,
    loss: PreferenceLoss,
    reference: Reference = "stored",
    extra: Regularization = NONE,
    sources: Sequence[str] = (),
    reference_decoder: Decoder | None = None,
) -> Objective:
    """Weighted sum of losses, each a mean over the pairs of the whole batch, from one forward pass of both answers.

    The reference's log-probabilities are columns of the rows (`stored`: `ref_chosen_logps`, `ref_rejected_logps`,
    float32[B, P]), computed in the step from the role `ref` of the frozen parameters (`live`), which are of
    `reference_decoder` (None: of the policy's), or there are none.
    Absent pairs (`pair_index` -1) count for nothing. A pair's `weight`, where rows have it, multiplies its losses; the
    mean is over pairs all the same. `extra` adds noise to the policy, and its own terms over answer tokens.

    Negative log-likelihoods (of `sft`, CPO, ORPO) are means over the tokens of the whole batch, and the losses that
    match answers across pairs (AOT) see all its pairs: both come from the first pass (`batch_statistics`).

    Metrics: TRL's `rewards/*` and `logps/*` over pairs, of the first loss that has them; `logits/chosen` and
    `logits/rejected`, the logits' mean over the vocabulary, and `entropy` over answer tokens (of both sides);
    `mean_token_accuracy` over the chosen answers' tokens only; `num_tokens` (all but padding, prompts once per side) as
    a count; and beside TRL's `implicit_kl`, the mean over both answers of log π - log π_ref in nats (the one-sample
    estimate of the policy's KL from its reference, with the data's answers for samples), `probs/chosen` and
    `probs/rejected`, the answers' probability per token (geometric mean), whose fall rewards do not show,
    `lengths/chosen` and `lengths/rejected` in tokens; `loss_NAME` and
    `rewards/accuracies_NAME` over the pairs of each of several `sources`.
    """
    names = ("logps", "entropy", "mean_logit", "is_top1")
    outputs = (*names, *(("log_sum_sq_probs",) if loss.use_weighting else ()), *extra.outputs)
    nlls = {term.named.nll for term in loss.terms} - {None}
    matched = bool(loss.statistics)
    judged = reference != "none" or any(term.named.has_beta for term in loss.terms)

    def policy_logps(params: Params, rows: Rows, key: Array) -> tuple[dict[str, Any], Array, dict[str, Array]]:
        """Scores of tokens, where they count, and what the losses take of each pair."""
        noise = extra.decoder_arguments(decoder, key, rows)
        also = chosen_side(rows) if "sequence" in nlls else None
        scores, mask = score_rows(bind(decoder, params["policy"]), rows, outputs, also=also, **noise)
        logps = scores["logps"]
        whole = None if also is None else sum_by_answer(logps, also, rows)[0]
        if also is not None:
            # Prompts were scored for their likelihood alone.
            scores |= {name: jnp.where(mask, scores[name], 0) for name in outputs}
            logps = scores["logps"]
        chosen_nll = None if "answer" not in nlls else -sum_by_answer(logps, mask, rows)[0]
        if loss.ld_alpha is not None:
            logps = without_tails(logps, mask, rows, loss.ld_alpha)
        chosen, rejected = sum_by_answer(logps, mask, rows)
        lengths = sum_by_answer(mask.astype(jnp.float32), mask, rows)
        found = {"chosen_logps": chosen, "rejected_logps": rejected}
        found |= dict(zip(("chosen_lengths", "rejected_lengths"), map(jax.lax.stop_gradient, lengths), strict=True))
        if chosen_nll is not None:
            found["answer_nll"] = chosen_nll
        if whole is not None:
            found["sequence_nll"] = -whole
        return scores, mask, found

    def reference_logps(frozen: Params, rows: Rows) -> dict[str, Array]:
        if reference == "none":
            return {}
        if reference == "live":
            said = answer_logps(bind(reference_decoder or decoder, frozen["ref"]), rows, loss.ld_alpha)
            return jax.lax.stop_gradient({f"ref_{name}": said[name] for name in LOGPS})
        present = rows["pair_index"] >= 0
        return {f"ref_{name}": jnp.where(present, rows[f"ref_{name}"], 0.0) for name in LOGPS}

    def first_pass(params: Params, frozen: Params, rows: Rows, key: Array) -> dict[str, Any]:
        found: dict[str, Any] = {"counts": counts(rows)} if nlls else {}
        if matched:
            _, _, own = policy_logps(params, rows, key)
            found["logps"] = reference_logps(frozen, rows) | {name: own[name] for name in LOGPS}
            found["logps"] |= {"present": rows["pair_index"] >= 0}
        return found

    def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Array) -> Sums:
        scores, mask, own = policy_logps(params, rows, key)
        own |= reference_logps(frozen, rows)
        present = rows["pair_index"] >= 0
        of_batch, of_routers = split_statistics(statistics, bool(nlls) or matched)
        if nlls:
            totals = counts(rows) if of_batch is None else jax.tree.map(lambda x: x.sum(0), of_batch.values["counts"])
            for kind in nlls:
                tokens = jnp.maximum(totals[f"{kind}_tokens"], 1.0)
                own[f"{kind}_nll"] = objectives.nll_shares(own[f"{kind}_nll"], tokens, totals["pairs"])
        weights = pair_weights(rows, own, scores, mask)
        before = running.so_far(params) if loss.running_delta else None
        sums, losses, metrics = {}, jnp.zeros_like(own["chosen_logps"]), {}
        if reference != "none" and not any(term.named.has_beta for term in loss.terms):
            metrics = objectives.implicit_rewards(*logps_of(own), beta=loss.beta)  # pyright: ignore[reportCallIssue]
        # What a loss without β calls a reward is none.
        for term in sorted(loss.terms, key=lambda term: not term.named.has_beta):
            given = arguments(term, own, rows)
            if term.named.statistics is not None:
                given[term.named.statistics] = statistic(term, own | {"present": present}, of_batch, before)
            values, said = term.function(*logps_of(own, term.named.reference), **(dict(term.arguments) | given))
            values = values if weights is None else values * weights
            sums[term.name] = over_pairs(values, present)
            losses = losses + term.factor * values
            metrics = said | metrics
        right = metrics.get(ACCURACIES, jnp.zeros_like(losses))
        pairs = present.sum().astype(jnp.float32)
        chosen, rejected = mask & (rows["side"] == 1), mask & (rows["side"] == 2)
        metrics = {n: (over_pairs(v, present), pairs) for n, v in (metrics | watched(own)).items()} | {
            "entropy": over_tokens(scores["entropy"], chosen | rejected),
            "mean_token_accuracy": over_tokens(scores["is_top1"], chosen),
            "logits/chosen": over_tokens(scores["mean_logit"], chosen),
            "logits/rejected": over_tokens(scores["mean_logit"], rejected),
        }
        if loss.running_delta:
            rewards = {side: loss.beta * (own[f"{side}_logps"] - own[f"ref_{side}_logps"]) for side in SIDES}
            metrics |= running.sums(rewards, dict.fromkeys(SIDES, present))
        metrics |= token_count(rows) | routing(scores) | source_values(rows, losses, present, sources)
        metrics |= source_values(rows, right, present, sources, ACCURACIES) if judged else {}
        return sums | extra.terms(scores, of_routers), metrics

    def pair_weights(rows: Rows, own: Mapping[str, Array], scores: Mapping[str, Array], mask: Array) -> Array | None:
        """What multiplies each pair's losses; None where nothing does."""
        weights = rows.get("weight")
        if not loss.use_weighting:
            return weights
        # Of all tokens alike, whatever weights `ld_alpha` gives them.
        logps, squares = (sum_by_answer(scores[name], mask, rows) for name in ("logps", "log_sum_sq_probs"))
        wpo = objectives.wpo(*logps, *squares, own["chosen_lengths"], own["rejected_lengths"])
        return wpo if weights is None else wpo * weights

    def weights(batch: Rows) -> dict[str, Array]:
        pairs = (batch["pair_index"] >= 0).sum().astype(jnp.float32)
        return {term.name: pairs for term in loss.terms} | extra.weights(batch)

    objective = Objective(
        terms,
        weights,
        {term.name: term.factor for term in loss.terms} | extra.coefficients,
        sparse=source_metrics(sources) + (source_metrics(sources, ACCURACIES) if judged else ()),
        **with_first_pass(extra.of_objective(decoder), first_pass if nlls or matched else None),
    )
    return running.carrying(objective) if loss.running_delta else objective


def chosen_side(rows: Rows) -> Array:
    """bool[B, T]: positions whose target is of a chosen side, the prompt's tokens among them."""
    return same_document(rows["segment_ids"], 1) & (rows["side"] == 1)


def counts(rows: Rows) -> dict[str, Array]:
    """How many pairs there are, and how many tokens their likelihoods are means over; float32."""
    answer = next_tokens(rows)[1] & (rows["side"] == 1)
    found = {
        "pairs": rows["pair_index"] >= 0,
        "answer_tokens": answer,
        "sequence_tokens": chosen_side(rows),
    }
    return {name: where.sum().astype(jnp.float32) for name, where in found.items()}


def logps_of(own: Mapping[str, Array], reference: bool = True) -> list[Array]:
    """The arguments by position that all losses have."""
    names = (*LOGPS, *(f"ref_{name}" for name in LOGPS)) if reference else LOGPS
    return [own[name] for name in names]


def statistic(term: Term, own: Mapping[str, Array], of_batch: Statistics | None, before: Running | None = None) -> Any:
    """A loss's statistic of the whole batch, from what the first pass found; without one the rows are all there is.
    BCO's shift is that of the batches `before` too."""
    count = own["present"].shape[0]
    whole = own if of_batch is None else Statistics(of_batch.values["logps"], of_batch.index).everything
    logps = logps_of(jax.lax.stop_gradient(dict(whole)))
    if term.named.statistics == "delta":
        policy, ref = (jnp.stack(logps[i : i + 2]) for i in (0, 2))
        labels = jnp.stack([jnp.ones_like(whole["present"]), jnp.zeros_like(whole["present"])])
        present = jnp.stack([whole["present"]] * 2)
        return objectives.bco_delta(policy, ref, labels, term.arguments["beta"], present, before)[0]
    matched = {"aot": objectives.aot_matched, "aot_unpaired": objectives.aot_unpaired_matched}[term.named.function]
    found = matched(*logps, whole["present"])
    return found if of_batch is None else own_rows(found, of_batch.index, count)


def arguments(term: Term, own: Mapping[str, Array], rows: Rows) -> dict[str, Array]:
    """What the pairs themselves give a loss by name."""
    given = {name: own[name] for name in term.named.lengths}
    if term.named.scores:
        given |= {f"{side}_scores": rows[f"{side}_score"] for side in SIDES}
    if term.named.function in SMOOTHED_BY_PAIR and "label_smoothing" in rows:
        own_smoothing = rows["label_smoothing"]
        given["label_smoothing"] = jnp.where(jnp.isnan(own_smoothing), term.arguments["label_smoothing"], own_smoothing)
    if term.named.nll is not None:
        given["chosen_nll"] = own[f"{term.named.nll}_nll"]
    return given


def over_pairs(values: Array, present: Array) -> Array:
    return jnp.where(present, values, 0.0).sum()


def watched(own: Mapping[str, Array]) -> dict[str, Array]:
    """Per-pair metrics beside TRL's."""
    own = jax.lax.stop_gradient(dict(own))
    found = {f"lengths/{side}": own[f"{side}_lengths"] for side in SIDES}
    for side in SIDES:
        found[f"probs/{side}"] = jnp.exp(own[f"{side}_logps"] / jnp.maximum(own[f"{side}_lengths"], 1.0))
    if "ref_chosen_logps" in own:
        ratios = [own[f"{side}_logps"] - own[f"ref_{side}_logps"] for side in SIDES]
        found["implicit_kl"] = (ratios[0] + ratios[1]) / 2
    return found
