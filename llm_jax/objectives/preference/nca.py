"""Noise Contrastive Alignment on pairs."""

import jax
from jaxtyping import Array, Float

from llm_jax.objectives.preference.shared import check_positive, implicit_rewards, log_ratios


def nca(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """NCA: loss of each pair, Chen et al. 2024 (arXiv:2402.05369), with K = 2 and the preference as the weight.

        loss = -log σ(β r_w) - ½ log σ(-β r_w) - ½ log σ(-β r_l)        r = log π(y|x) - log π_ref(y|x)

    Its optimum is absolute: unlike DPO's it does not let both likelihoods fall together. TRL's `nca_pair`.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta not positive.
    """
    check_positive("nca", beta=beta)
    chosen = beta * log_ratios(chosen_logps, ref_chosen_logps)
    rejected = beta * log_ratios(rejected_logps, ref_rejected_logps)
    against = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    losses = -jax.nn.log_sigmoid(chosen) - 0.5 * against
    return losses, implicit_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
