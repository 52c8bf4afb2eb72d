"""The hinge loss on log-ratios."""

import jax
from jaxtyping import Array, Float

from llm_jax.objectives.preference.divergence import FDivergence, pair_scores
from llm_jax.objectives.preference.shared import check_positive, implicit_rewards


def hinge(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Hinge loss of each pair: RSO's, Liu et al. 2023 (arXiv:2309.06657), after SLiC (arXiv:2305.10425).

        loss = max(0, 1 - β d)        d as for `dpo`

    Without a reference (its log-probabilities 0) it is SLiC's calibration loss with margin 1 / β, as in TRL's
    CPOTrainer.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0; 1 / β is the margin that d is pushed beyond.
        f_divergence_type, f_alpha_divergence_coef: another divergence than reverse KL (`f_divergence`), as TRL has it.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta not positive.
    """
    check_positive("hinge", beta=beta)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = pair_scores(*logps, f_divergence_type, f_alpha_divergence_coef)
    return jax.nn.relu(1 - beta * (chosen - rejected)), implicit_rewards(*logps, beta)
