"""WPO: weights that make off-policy pairs count as if the policy had sampled them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from llm_jax.objectives.preference.shared import token_means


def wpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    chosen_log_sum_sq_probs: Float[Array, "*batch"],
    rejected_log_sum_sq_probs: Float[Array, "*batch"],
    chosen_lengths: Num[Array, "*batch"] | None = None,
    rejected_lengths: Num[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """WPO's weight of each pair, eq. 2 of Zhou et al. 2024 (arXiv:2406.11827), sampled alignment; multiplies any loss.

        w(y) = exp(1/|y| * sum over t of (log π(y_t|…) - log sum over v of π(v|…)²)),    weight = w(y_w) w(y_l)

    Args:
        chosen_logps, rejected_logps: policy's log-probabilities in nats, summed over the answer's tokens, float32, any
            shape, one entry per pair.
        chosen_log_sum_sq_probs, rejected_log_sum_sq_probs: log of the sum over the vocabulary of squared
            probabilities, summed over the same tokens.
        chosen_lengths, rejected_lengths: tokens per answer, the one that ends it included, same shape; needed.

    Returns:
        float32 weights of the same shape, without gradient; not bounded by 1 (TRL does not either). A job's likelihoods
        of pairs (`sft`) are weighted pair by pair; TRL multiplies the batch's mean of them by the mean weight.

    Raises:
        UserError: lengths missing.
    """
    chosen, rejected = token_means(
        "wpo",
        chosen_logps - chosen_log_sum_sq_probs,
        rejected_logps - rejected_log_sum_sq_probs,
        chosen_lengths,
        rejected_lengths,
    )
    return jax.lax.stop_gradient(jnp.exp(chosen + rejected))
