"""Efficient Exact Optimization on pairs."""

import math

import jax
from jaxtyping import Array, Float

from llm_jax.base.errors import UserError
from llm_jax.objectives.preference.divergence import FDivergence, pair_scores
from llm_jax.objectives.preference.shared import check_positive, implicit_rewards


def exo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """EXO-pref: loss of each pair, eq. 16 of Ji et al. 2024 (arXiv:2402.00856).

        loss = KL(q || p),    q = (σ(β d), σ(-β d)),    p = (1 - ε, ε)        d as for `dpo`

    the reverse of the divergence that conservative DPO minimizes; TRL's `exo_pair`.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, the paper's β_π.
        label_smoothing: ε in (0, 0.5], the probability that a label is flipped; at 0 the divergence is infinite. The
            paper takes 1e-3.
        f_divergence_type, f_alpha_divergence_coef: another divergence than reverse KL (`f_divergence`), as TRL has it.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta or label_smoothing outside its range.
    """
    check_positive("exo", beta=beta, label_smoothing=label_smoothing)
    if label_smoothing > 0.5:
        raise UserError(f"exo: label_smoothing must be at most 0.5, not {label_smoothing}")
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = pair_scores(*logps, f_divergence_type, f_alpha_divergence_coef)
    scaled = beta * (chosen - rejected)
    losses = jax.nn.sigmoid(scaled) * (jax.nn.log_sigmoid(scaled) - math.log1p(-label_smoothing))
    losses += jax.nn.sigmoid(-scaled) * (jax.nn.log_sigmoid(-scaled) - math.log(label_smoothing))
    return losses, implicit_rewards(*logps, beta)
