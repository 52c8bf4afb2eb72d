"""Alignment via Optimal Transport on pairs."""

import jax
from jaxtyping import Array, Bool, Float

from llm_jax.objectives.preference.ranks import equal_rank
from llm_jax.objectives.preference.shared import check_positive, check_smoothing, implicit_rewards, smoothed_logistic


def aot(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    matched: Float[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """AOT on pairs: Melnyk et al. 2024 (arXiv:2406.05882), with the logistic loss.

        u = log π(y_w|x) - log π(y_l|x),    v = log π_ref(y_w|x) - log π_ref(y_l|x)
        loss of rank i = -(1 - ε) log σ(β (u_(i) - v_(i))) - ε log σ(-β (u_(i) - v_(i)))

    u_(i) and v_(i) being the i-th smallest of the whole batch: the policy's margins shall dominate the reference's in
    distribution, not pair by pair.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.
        label_smoothing: ε in [0, 0.5].
        matched: for each pair the v of its u's rank in the whole batch (`aot_matched`); None: these pairs are the whole
            batch. TRL sorts within each device's microbatch.

    Returns:
        float32 losses of the same shape, each at the place of its u, not reduced, and the metrics of
        `implicit_rewards`.

    Raises:
        UserError: beta or label_smoothing outside its range.
    """
    check_positive("aot", beta=beta)
    check_smoothing("aot", label_smoothing)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    matched = aot_matched(*logps) if matched is None else matched
    logits = beta * (chosen_logps - rejected_logps - jax.lax.stop_gradient(matched))
    return smoothed_logistic(logits, label_smoothing), implicit_rewards(*logps, beta)


def aot_matched(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    present: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """The statistic of `aot`, from the log-probabilities of the whole batch, of any one shape, to one of that shape.

    `present` is False where there is no pair. No gradient.
    """
    return equal_rank(chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps, present)
