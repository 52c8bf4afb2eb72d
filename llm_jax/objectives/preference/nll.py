"""Negative log-likelihood of the chosen side, for the losses that add it."""

from jaxtyping import Array, Float

from llm_jax.objectives.preference.shared import reward_metrics


def sft_pair(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    chosen_nll: Float[Array, "*batch"],
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Each pair's share of the negative log-likelihood of the chosen answers: TRL's `sft` beside another loss.

    Args:
        chosen_logps, rejected_logps: summed log-probabilities in nats, float32, any shape, one entry per pair (as for
            `dpo`); there is no reference.
        chosen_nll: the shares (`nll_shares`), same shape.

    Returns:
        `chosen_nll`, and per pair `logps/chosen` and `logps/rejected` among the metrics of `implicit_rewards`, rewards
        being log-probabilities here (β = 1 and no reference).
    """
    return chosen_nll, reward_metrics(chosen_logps, rejected_logps, chosen_logps, rejected_logps)


def nll_shares(
    nll: Float[Array, "*batch"], tokens: Float[Array, ""] | float, pairs: Float[Array, ""] | float
) -> Float[Array, "*batch"]:
    """Summed negative log-likelihoods scaled so that their mean over pairs is the mean over tokens of the whole batch.

    Args:
        nll: -log π in nats, summed over the tokens that count of each pair, float32, any shape.
        tokens, pairs: how many there are in the whole batch, over all microbatches and devices.

    TRL divides by the tokens of the microbatch instead, so that its loss depends on how a batch is cut.
    """
    return nll * (pairs / tokens)
