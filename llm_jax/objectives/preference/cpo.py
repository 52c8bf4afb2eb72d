"""Contrastive Preference Optimization."""

import jax
from jaxtyping import Array, Float

from llm_jax.objectives.preference.shared import check_positive, check_smoothing, reward_metrics, smoothed_logistic


def cpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    chosen_nll: Float[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """CPO: loss of each pair, eq. 3 of Xu et al. 2024 (arXiv:2401.08417).

        loss = -log σ(β (log π(y_w|x) - log π(y_l|x))) - α log π(y_w|x),    with ε > 0 smoothed as in `dpo`

    Args:
        chosen_logps, rejected_logps: summed log-probabilities in nats, float32, any shape, one entry per pair (as for
            `dpo`); there is no reference.
        beta: β > 0, scale of the log-probabilities.
        cpo_alpha: α, weight of the likelihood of the chosen answer; the paper's is 1.
        label_smoothing: ε in [0, 0.5], the probability that a label is flipped.
        chosen_nll: what stands in the place of -log π(y_w|x). The authors' code and TRL take its mean over
            the tokens of all chosen answers (`nll_shares`); None is the sum, the equation as printed.

    Returns:
        float32 losses of the same shape, not reduced, and per pair the metrics of `implicit_rewards` without a
        reference, and `nll_loss`, as TRL logs them.

    Raises:
        UserError: beta or label_smoothing outside its range.
    """
    check_positive("cpo", beta=beta)
    check_smoothing("cpo", label_smoothing)
    nll = -chosen_logps if chosen_nll is None else chosen_nll
    losses = smoothed_logistic(beta * (chosen_logps - rejected_logps), label_smoothing) + cpo_alpha * nll
    metrics = reward_metrics(beta * chosen_logps, beta * rejected_logps, chosen_logps, rejected_logps)
    return losses, metrics | {"nll_loss": jax.lax.stop_gradient(nll)}
