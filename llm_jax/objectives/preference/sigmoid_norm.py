"""DPO on log-ratios per token."""

import jax
from jaxtyping import Array, Float, Num

from llm_jax.objectives.preference.divergence import FDivergence, pair_scores
from llm_jax.objectives.preference.shared import check_positive, implicit_rewards, token_means


def sigmoid_norm(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    chosen_lengths: Num[Array, "*batch"] | None = None,
    rejected_lengths: Num[Array, "*batch"] | None = None,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """DPO on length-normalized log-ratios: loss of each pair, Tülu 3 (Lambert et al. 2024, arXiv:2411.15124).

        loss = -log σ(β (r_w / |y_w| - r_l / |y_l|))        r = log π(y|x) - log π_ref(y|x)

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0; per token, so larger than `dpo`'s (Tülu 3 takes 5).
        chosen_lengths, rejected_lengths: tokens per answer, the one that ends it included, same shape; needed.
        f_divergence_type, f_alpha_divergence_coef: another divergence than reverse KL (`f_divergence`), as TRL has it.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair (of the sums, as
        TRL logs them).

    Raises:
        UserError: beta not positive, or lengths missing.
    """
    check_positive("sigmoid_norm", beta=beta)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    scores = pair_scores(*logps, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = token_means("sigmoid_norm", *scores, chosen_lengths, rejected_lengths)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected)), implicit_rewards(*logps, beta)
