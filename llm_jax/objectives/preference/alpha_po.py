"""AlphaPO: SimPO with a reward of another shape."""

from jaxtyping import Array, Float, Num

from llm_jax.objectives.preference.divergence import f_divergence
from llm_jax.objectives.preference.shared import (
    check_positive,
    check_smoothing,
    reward_metrics,
    smoothed_logistic,
    token_means,
)


def alpha_po(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
    chosen_lengths: Num[Array, "*batch"] | None = None,
    rejected_lengths: Num[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """AlphaPO: loss of each pair, Gupta et al. 2025 (arXiv:2501.03884).

        ρ = (1 - p^-α) / α,    p = exp(log π(y|x) / |y|)
        loss = -log σ(β ρ_w - β ρ_l - γ),    with ε > 0 smoothed as in `simpo`

    Args:
        chosen_logps, rejected_logps: summed log-probabilities in nats, float32, any shape, one entry per pair (as for
            `dpo`); there is no reference.
        beta: β > 0, scale of the rewards β ρ.
        simpo_gamma: γ, the target margin, in units of reward.
        alpha: α, any sign; at 0 it is `simpo`.
        label_smoothing: ε in [0, 0.5], the probability that a label is flipped.
        chosen_lengths, rejected_lengths: tokens per answer, the one that ends it included, same shape; needed.

    Returns:
        float32 losses of the same shape, not reduced, and per pair the metrics of `implicit_rewards` as TRL logs them:
        rewards β ρ, and `logps/*` the averages log p.

    Raises:
        UserError: beta or label_smoothing outside its range, or lengths missing.

    p^-α is the power of `f_divergence`'s `alpha`, bounded as there: TRL's is infinite, and its gradient NaN, where p
    underflows.
    """
    check_positive("alpha_po", beta=beta)
    check_smoothing("alpha_po", label_smoothing)
    means = token_means("alpha_po", chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen, rejected = (beta * f_divergence(mean, "alpha", alpha) for mean in means)
    return smoothed_logistic(chosen - rejected - simpo_gamma, label_smoothing), reward_metrics(chosen, rejected, *means)
