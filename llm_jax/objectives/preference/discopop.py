"""The discovered loss DiscoPOP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.objectives.preference.divergence import FDivergence, pair_scores
from llm_jax.objectives.preference.shared import check_positive, implicit_rewards


def discopop(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """DiscoPOP, the log-ratio modulated loss: loss of each pair, eq. 5 of Lu et al. 2024 (arXiv:2406.08414).

        loss = (1 - σ(β d / τ)) (-log σ(β d)) + σ(β d / τ) exp(-β d)        d as for `dpo`

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.
        discopop_tau: τ > 0, how sharply the logistic part passes into the exponential one.
        f_divergence_type, f_alpha_divergence_coef: another divergence than reverse KL (`f_divergence`), as TRL has it.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta or discopop_tau not positive.

    The last product is taken as one exponential: TRL multiplies infinity by 0, NaN from β d = -89 in float32. Only
    with τ > 1 does it grow with -β d; it is then constant beyond exp(80), or exp(700) for float64.
    """
    check_positive("discopop", beta=beta, discopop_tau=discopop_tau)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = pair_scores(*logps, f_divergence_type, f_alpha_divergence_coef)
    scaled = beta * (chosen - rejected)
    exponent = jax.nn.log_sigmoid(scaled / discopop_tau) - scaled
    limit = 700.0 if scaled.dtype == jnp.float64 else 80.0
    logistic = jax.nn.sigmoid(-scaled / discopop_tau) * -jax.nn.log_sigmoid(scaled)
    return logistic + jnp.exp(jnp.minimum(exponent, limit)), implicit_rewards(*logps, beta)
