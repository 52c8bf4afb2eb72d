"""Self-Play Preference Optimization with estimated win probabilities."""

import jax
from jaxtyping import Array, Float

from llm_jax.objectives.preference.shared import check_positive, implicit_rewards, log_ratios


def sppo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    chosen_scores: Float[Array, "*batch"],
    rejected_scores: Float[Array, "*batch"],
    beta: float = 1e-3,
    halved: bool = True,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """SPPO: loss of each pair, eq. 4.7 of Wu et al. 2024 (arXiv:2405.00675) on two answers.

        loss = ½ [(r_w - (P_w - ½) / β)² + (r_l - (P_l - ½) / β)²]        r = log π(y|x) - log π_ref(y|x)

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        chosen_scores, rejected_scores: P(y ≻ π_t | x), each answer's probability of winning against the policy that
            sampled it, estimated over samples of the round, in [0, 1], same shape; constants.
        beta: β > 0, the inverse of the paper's step size η.
        halved: the mean over the two answers, as the authors' code has it; False is their sum.

    The reference is the policy that the round started from. With P_w = 1 and P_l = 0 it is `sppo_hard`.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta not positive.
    """
    check_positive("sppo", beta=beta)
    targets = jax.lax.stop_gradient(((chosen_scores - 0.5) / beta, (rejected_scores - 0.5) / beta))
    chosen = (log_ratios(chosen_logps, ref_chosen_logps) - targets[0]) ** 2
    rejected = (log_ratios(rejected_logps, ref_rejected_logps) - targets[1]) ** 2
    losses = (0.5 if halved else 1.0) * (chosen + rejected)
    return losses, implicit_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
