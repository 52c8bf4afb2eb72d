"""CPO with a hinge, without a reference."""

import jax
from jaxtyping import Array, Float

from llm_jax.objectives.preference.shared import check_positive, reward_metrics


def cpo_hinge(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    chosen_nll: Float[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Loss of each pair of TRL's CPOTrainer with `loss_type="hinge"`: SLiC's calibration loss with margin 1 / β and its
    pull to the data, Zhao et al. 2023 (arXiv:2305.10425), eq. 1 with the chosen answer for the target.

        loss = max(0, 1 - β (log π(y_w|x) - log π(y_l|x))) - α log π(y_w|x)

    Args:
        chosen_logps, rejected_logps: summed log-probabilities in nats, float32, any shape, one entry per pair (as for
            `dpo`); there is no reference.
        beta: β > 0; 1 / β is the margin.
        cpo_alpha: α, weight of the likelihood of the chosen answer.
        chosen_nll: what stands in the place of -log π(y_w|x), as for `cpo`.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `cpo`.

    Raises:
        UserError: beta not positive.
    """
    check_positive("cpo_hinge", beta=beta)
    nll = -chosen_logps if chosen_nll is None else chosen_nll
    losses = jax.nn.relu(1 - beta * (chosen_logps - rejected_logps)) + cpo_alpha * nll
    metrics = reward_metrics(beta * chosen_logps, beta * rejected_logps, chosen_logps, rejected_logps)
    return losses, metrics | {"nll_loss": jax.lax.stop_gradient(nll)}
