"""DPO-Positive."""

import jax
from jaxtyping import Array, Float

from llm_jax.base.errors import UserError
from llm_jax.objectives.preference.shared import check_positive, implicit_rewards, log_ratios


def dpop(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    dpop_lambda: float = 50.0,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """DPO-Positive: loss of each pair, Pal et al. 2024 (arXiv:2402.13228, "Smaug").

        loss = -log σ(β (r_w - r_l - λ max(0, -r_w)))        r = log π(y|x) - log π_ref(y|x)

    DPO with a penalty once the chosen answer falls below its likelihood under the reference, as DPO lets it do on pairs
    that are nearly equal.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.
        dpop_lambda: λ >= 0; the paper takes 50. At 0 it is `dpo`.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta or dpop_lambda outside its range.
    """
    check_positive("dpop", beta=beta)
    if not dpop_lambda >= 0:
        raise UserError(f"dpop: dpop_lambda must be at least 0, not {dpop_lambda}")
    chosen = log_ratios(chosen_logps, ref_chosen_logps)
    rejected = log_ratios(rejected_logps, ref_rejected_logps)
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected - dpop_lambda * jax.nn.relu(-chosen)))
    return losses, implicit_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
