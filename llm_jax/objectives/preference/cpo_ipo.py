"""CPO with IPO's square, without a reference."""

import jax
from jaxtyping import Array, Float, Num

from llm_jax.objectives.preference.shared import check_positive, reward_metrics, token_means


def cpo_ipo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    chosen_nll: Float[Array, "*batch"] | None = None,
    chosen_lengths: Num[Array, "*batch"] | None = None,
    rejected_lengths: Num[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Loss of each pair of TRL's CPOTrainer with `loss_type="ipo"`: `ipo` whose reference finds all answers alike.

        a = log π(y|x) / |y|
        loss = (a_w - a_l - 1 / (2 β))² - α log π(y_w|x)

    Args:
        chosen_logps, rejected_logps: summed log-probabilities in nats, float32, any shape, one entry per pair (as for
            `dpo`); there is no reference.
        beta: β > 0, as for `ipo`.
        cpo_alpha: α, weight of the likelihood of the chosen answer.
        chosen_nll: what stands in the place of -log π(y_w|x), as for `cpo`.
        chosen_lengths, rejected_lengths: tokens per answer, the one that ends it included, same shape; needed.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `cpo`, of the averages a as TRL logs them.

    Raises:
        UserError: beta not positive, or lengths missing.
    """
    check_positive("cpo_ipo", beta=beta)
    chosen, rejected = token_means("cpo_ipo", chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    nll = -chosen_logps if chosen_nll is None else chosen_nll
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2 + cpo_alpha * nll
    metrics = reward_metrics(beta * chosen, beta * rejected, chosen, rejected)
    return losses, metrics | {"nll_loss": jax.lax.stop_gradient(nll)}
