"""Kahneman-Tversky Optimization, and its reference point."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.objectives.preference.shared import check_positive, labelled_rewards, log_ratios


def kto(
    logps: Float[Array, "*batch"],
    ref_logps: Float[Array, "*batch"],
    labels: Bool[Array, "*batch"],
    kl: Float[Array, ""] | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """KTO: loss of each answer with a label, eq. 7 of Ethayarajh et al. 2024 (arXiv:2402.01306).

        desirable:   λ_D (1 - σ(β (r - z)))        r = log π(y|x) - log π_ref(y|x)
        undesirable: λ_U (1 - σ(β (z - r)))

    Args:
        logps, ref_logps: summed log-probabilities in nats of each answer, the policy's and the reference's (a constant
            to the gradient), float32, any shape.
        labels: True where the answer is desirable.
        kl: the reference point z >= 0, an estimate of KL(π || π_ref) of the whole batch (`kto_kl`); a constant to the
            gradient.
        beta: β > 0, risk aversion and strength of the pull to the reference.
        desirable_weight, undesirable_weight: λ_D and λ_U; with n_D and n_U examples the authors advise
            λ_D n_D / (λ_U n_U) in [1, 4/3].

    Returns:
        float32 losses of the same shape, not reduced, and per example the metrics of `labelled_rewards` and `kl`.

    Raises:
        UserError: beta not positive.

    TRL, HALOs and LLaMA-Factory compute this; OpenRLHF's and early TRL's `kto_pair` was another loss.
    """
    check_positive("kto", beta=beta)
    kl = jax.lax.stop_gradient(jnp.broadcast_to(jnp.asarray(kl, logps.dtype), logps.shape))
    above = beta * (log_ratios(logps, ref_logps) - kl)
    losses = jnp.where(labels, desirable_weight, undesirable_weight) * jax.nn.sigmoid(jnp.where(labels, -above, above))
    return losses, labelled_rewards(logps, ref_logps, labels, beta) | {"kl": kl}


def kto_kl(
    kl_logps: Float[Array, "*batch"],
    ref_kl_logps: Float[Array, "*batch"],
    present: Bool[Array, "*batch"] | None = None,
    nonzero_only: bool = False,
) -> Float[Array, ""]:
    """KTO's reference point z from mismatched pairs of the whole batch: below eq. 7 of Ethayarajh et al. 2024.

        z = max(0, mean of log π(y'|x) - log π_ref(y'|x)),    y' the answer to another prompt of the batch

    Args:
        kl_logps, ref_kl_logps: summed log-probabilities in nats of each prompt with the answer of the example after it,
            of all examples of the global batch. TRL turns the answers by one inside each device's microbatch, so that
            its z depends on how a batch is cut and on the order within it.
        present: False where an example is padding and counts for nothing.
        nonzero_only: divide by the number of examples whose log-ratio is not exactly 0, as HALOs does.

    Returns:
        float32[] without gradient; 0 of a batch in which nothing counts.
    """
    ratios = jax.lax.stop_gradient(kl_logps - ref_kl_logps)
    counted = jnp.ones(ratios.shape, bool) if present is None else present
    if nonzero_only:
        counted &= ratios != 0
    return jnp.maximum(jnp.where(counted, ratios, 0.0).sum() / jnp.maximum(counted.sum(), 1), 0.0)
