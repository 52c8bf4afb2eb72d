"""Binary Classifier Optimization on pairs."""

import jax
from jaxtyping import Array, Float

from llm_jax.objectives.preference.shared import check_positive, implicit_rewards, log_ratios


def bco(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    delta: Float[Array, ""] | float | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """BCO: loss of each pair, Jung et al. 2024 (arXiv:2404.04656): both answers are classified apart.

        loss = -log σ(β r_w - δ) - log σ(-(β r_l - δ))        r = log π(y|x) - log π_ref(y|x)
        δ = ½ (mean of β r_w + mean of β r_l)

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.
        delta: the reward shift δ of the whole batch or of the run so far (`bco_delta`), a constant to the gradient;
            None: these pairs are the whole batch; 0 is TRL's `bco_pair`, which leaves the shift out.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta not positive.
    """
    check_positive("bco", beta=beta)
    chosen = beta * log_ratios(chosen_logps, ref_chosen_logps)
    rejected = beta * log_ratios(rejected_logps, ref_rejected_logps)
    if delta is None:
        delta = (chosen.mean() + rejected.mean()) / 2
    delta = jax.lax.stop_gradient(delta)
    losses = -jax.nn.log_sigmoid(chosen - delta) - jax.nn.log_sigmoid(delta - rejected)
    return losses, implicit_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
