"""Anchored Preference Optimization for answers better than the model's."""

import jax
from jaxtyping import Array, Float

from llm_jax.objectives.preference.shared import check_positive, implicit_rewards, log_ratios


def apo_zero(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """APO-zero: loss of each pair, eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266).

        loss = (1 - σ(β r_w)) + σ(β r_l)        r = log π(y|x) - log π_ref(y|x)

    raises the chosen answer's likelihood and lowers the rejected one's: for chosen answers better than the model's own.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta not positive.
    """
    check_positive("apo_zero", beta=beta)
    chosen = beta * log_ratios(chosen_logps, ref_chosen_logps)
    rejected = beta * log_ratios(rejected_logps, ref_rejected_logps)
    losses = jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)
    return losses, implicit_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
