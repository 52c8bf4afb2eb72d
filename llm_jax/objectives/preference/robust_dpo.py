"""DPO that is unbiased under flipped labels."""

import jax
from jaxtyping import Array, Float

from llm_jax.base.errors import UserError
from llm_jax.objectives.preference.divergence import FDivergence, pair_scores
from llm_jax.objectives.preference.shared import check_positive, implicit_rewards


def robust_dpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Robust DPO: loss of each pair, Chowdhury et al. 2024 (arXiv:2403.00409).

        loss = (-(1 - ε) log σ(β d) + ε log σ(-β d)) / (1 - 2 ε)        d as for `dpo`

    Its expectation over labels flipped with probability ε is the loss on the true labels; TRL's `robust` is the same.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.
        label_smoothing: ε in [0, 0.5), the probability that a label is flipped.
        f_divergence_type, f_alpha_divergence_coef: another divergence than reverse KL (`f_divergence`), as TRL has it.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta or label_smoothing outside its range.
    """
    check_positive("robust_dpo", beta=beta)
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"robust_dpo: label_smoothing must be at least 0 and below 0.5, not {label_smoothing}")
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = pair_scores(*logps, f_divergence_type, f_alpha_divergence_coef)
    scaled = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled) + label_smoothing * jax.nn.log_sigmoid(-scaled)
    return losses / (1 - 2 * label_smoothing), implicit_rewards(*logps, beta)
