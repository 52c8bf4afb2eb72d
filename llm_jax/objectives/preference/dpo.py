"""Direct Preference Optimization, and its conservative form."""

from jaxtyping import Array, Float

from llm_jax.objectives.preference.divergence import FDivergence, pair_scores
from llm_jax.objectives.preference.shared import (
    check_positive,
    check_smoothing,
    implicit_rewards,
    smoothed_logistic,
)


def dpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    label_smoothing: float | Float[Array, "*batch"] = 0.0,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Direct Preference Optimization: loss of each pair, eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

    With ε > 0 it is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).

        d = (log π(y_w|x) - log π_ref(y_w|x)) - (log π(y_l|x) - log π_ref(y_l|x))
        loss = -(1 - ε) log σ(β d) - ε log σ(-β d)

    Args:
        chosen_logps, rejected_logps: policy's log-probabilities in nats, summed over the answer's tokens (the one that
            ends it included, the prompt's not), float32, any shape, one entry per pair.
        ref_chosen_logps, ref_rejected_logps: the reference's, same shape; constants to the gradient.
        beta: β > 0, strength of the pull to the reference.
        label_smoothing: ε in [0, 0.5], the probability that a label is flipped; of all, or one of each pair (MCTS-DPO,
            Xie et al. 2024, arXiv:2405.00451, takes it from the two answers' visit counts).
        f_divergence_type, f_alpha_divergence_coef: another divergence than reverse KL (`f_divergence`).

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta or label_smoothing outside its range.

    Deviations of others: TRL's `loss_type="sigmoid"` ignores `label_smoothing` (its `robust` is another loss: divided
    by 1 - 2ε, the second term of opposite sign); OpenRLHF, HALOs, LLaMA-Factory and the authors' code do as here.
    """
    check_positive("dpo", beta=beta)
    check_smoothing("dpo", label_smoothing)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = pair_scores(*logps, f_divergence_type, f_alpha_divergence_coef)
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing), implicit_rewards(*logps, beta)
