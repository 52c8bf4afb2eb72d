"""Alignment via Optimal Transport on two sets of answers."""

import jax
from jaxtyping import Array, Bool, Float

from llm_jax.objectives.preference.ranks import equal_rank
from llm_jax.objectives.preference.shared import (
    check_positive,
    check_smoothing,
    implicit_rewards,
    log_ratios,
    smoothed_logistic,
)


def aot_unpaired(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    matched: tuple[Float[Array, "*batch"], Float[Array, "*batch"]] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Unpaired AOT: Melnyk et al. 2024 (arXiv:2406.05882), with the logistic loss.

        r = log π(y|x) - log π_ref(y|x)
        loss of rank i = -(1 - ε) log σ(β (r_w(i) - r_l(i))) - ε log σ(-β (r_w(i) - r_l(i)))

    r_w(i) and r_l(i) being the i-th smallest of the whole batch: the rewards of chosen answers shall dominate those of
    rejected ones in distribution; which was whose rival does not matter.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.
        label_smoothing: ε in [0, 0.5].
        matched: the r_l of each r_w's rank and the r_w of each r_l's rank in the whole batch (`aot_unpaired_matched`);
            None: these answers are the whole batch. TRL sorts within each device's microbatch.

    Returns:
        float32 losses of the same shape, each at the place of its r_w, not reduced, and the metrics of
        `implicit_rewards`. Value and gradient, in both answers' log-probabilities, are right in the sum over the whole
        batch, however it is cut into microbatches.

    Raises:
        UserError: beta or label_smoothing outside its range.
    """
    check_positive("aot_unpaired", beta=beta)
    check_smoothing("aot_unpaired", label_smoothing)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    of_chosen, of_rejected = jax.lax.stop_gradient(aot_unpaired_matched(*logps) if matched is None else matched)
    chosen, rejected = log_ratios(chosen_logps, ref_chosen_logps), log_ratios(rejected_logps, ref_rejected_logps)
    losses = smoothed_logistic(beta * (chosen - of_chosen), label_smoothing)
    # The partner's place may be in another microbatch: its gradient comes from here, its value from there.
    partners = smoothed_logistic(beta * (of_rejected - rejected), label_smoothing)
    return losses + (partners - jax.lax.stop_gradient(partners)), implicit_rewards(*logps, beta)


def aot_unpaired_matched(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    present: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The statistic of `aot_unpaired`, from the log-probabilities of the whole batch, of any one shape, to two of it.

    `present` is False where there is no pair. No gradient.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return equal_rank(chosen, rejected, present), equal_rank(rejected, chosen, present)
