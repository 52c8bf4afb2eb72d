"""Simple Preference Optimization."""

from jaxtyping import Array, Float, Num

from llm_jax.objectives.preference.shared import (
    check_positive,
    check_smoothing,
    reward_metrics,
    smoothed_logistic,
    token_means,
)


def simpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
    chosen_lengths: Num[Array, "*batch"] | None = None,
    rejected_lengths: Num[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """SimPO: loss of each pair, eq. 6 of Meng et al. 2024 (arXiv:2405.14734).

        a = log π(y|x) / |y|
        loss = -log σ(β a_w - β a_l - γ),    with ε > 0: -(1 - ε) log σ(β a_w - β a_l - γ) - ε log σ(-(…))

    Args:
        chosen_logps, rejected_logps: summed log-probabilities in nats, float32, any shape, one entry per pair (as for
            `dpo`); there is no reference.
        beta: β > 0, scale of the rewards β a. The authors take 2 to 10; TRL's and LLaMA-Factory's default is 0.1.
        simpo_gamma: γ, the target margin, in units of reward as in the paper and in TRL. The authors' code takes
            `gamma_beta_ratio` instead, γ / β (0.25 by default, here γ = 0.5).
        label_smoothing: ε in [0, 0.5], the probability that a label is flipped (the authors' code has it).
        chosen_lengths, rejected_lengths: tokens per answer, the one that ends it included, same shape; needed.

    Returns:
        float32 losses of the same shape, not reduced, and per pair the metrics of `implicit_rewards` as TRL logs them:
        rewards β a, and `logps/*` the averages a.

    Raises:
        UserError: beta or label_smoothing outside its range, or lengths missing.

    TRL's CPOTrainer adds `cpo_alpha` (1.0!) times the chosen answer's negative log-likelihood: `sft_pair` beside it.
    """
    check_positive("simpo", beta=beta)
    check_smoothing("simpo", label_smoothing)
    chosen, rejected = token_means("simpo", chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    losses = smoothed_logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)
    return losses, reward_metrics(beta * chosen, beta * rejected, chosen, rejected)
