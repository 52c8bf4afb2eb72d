"""Losses on pairs of answers, one chosen and one rejected, from their summed log-probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from llm_jax.base.errors import UserError


def dpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Direct Preference Optimization: loss of each pair, eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

    With ε > 0 it is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).

        d = (log π(y_w|x) - log π_ref(y_w|x)) - (log π(y_l|x) - log π_ref(y_l|x))
        loss = -(1 - ε) log σ(β d) - ε log σ(-β d)

    Args:
        chosen_logps, rejected_logps: policy's log-probabilities in nats, summed over the answer's tokens (the one that
            ends it included, the prompt's not), float32, any shape, one entry per pair.
        ref_chosen_logps, ref_rejected_logps: the reference's, same shape; constants to the gradient.
        beta: β > 0, strength of the pull to the reference.
        label_smoothing: ε in [0, 0.5], the probability that a label is flipped.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair.

    Raises:
        UserError: beta or label_smoothing outside its range.

    Deviations of others: TRL's `loss_type="sigmoid"` ignores `label_smoothing` (its `robust` is another loss: divided
    by 1 - 2ε, the second term of opposite sign); OpenRLHF, HALOs, LLaMA-Factory and the authors' code do as here.
    """
    if not beta > 0:
        raise UserError(f"dpo: beta must be greater than 0, not {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise UserError(f"dpo: label_smoothing must lie in [0, 0.5], not {label_smoothing}")
    ref_chosen_logps, ref_rejected_logps = jax.lax.stop_gradient((ref_chosen_logps, ref_rejected_logps))
    scaled = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    losses = -jax.nn.log_sigmoid(scaled)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * jax.nn.log_sigmoid(-scaled)
    return losses, implicit_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)


def ipo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    length_normalized: bool = True,
    chosen_lengths: Num[Array, "*batch"] | None = None,
    rejected_lengths: Num[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Identity Preference Optimization: loss of each pair, eq. 17 of Azar et al. 2023 (arXiv:2310.12036).

        h = (log π(y_w|x) - log π_ref(y_w|x)) - (log π(y_l|x) - log π_ref(y_l|x))
        loss = (h - 1 / (2 β))²

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, the paper's τ; `beta` here as everywhere else.
        length_normalized: divide each log-ratio by its answer's number of tokens, which the authors confirmed to be
            what they meant (TRL, HALOs and LLaMA-Factory do it); False is the equation as printed, which the DPO
            authors' code and OpenRLHF compute.
        chosen_lengths, rejected_lengths: tokens per answer, the one that ends it included, same shape; used only
            when length_normalized, and needed then.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair (of the sums,
        whatever the normalization, as TRL logs them).

    Raises:
        UserError: beta not positive, or lengths missing where they are needed.
    """
    if not beta > 0:
        raise UserError(f"ipo: beta must be greater than 0, not {beta}")
    ref_chosen_logps, ref_rejected_logps = jax.lax.stop_gradient((ref_chosen_logps, ref_rejected_logps))
    chosen_ratios = chosen_logps - ref_chosen_logps
    rejected_ratios = rejected_logps - ref_rejected_logps
    if length_normalized:
        if chosen_lengths is None or rejected_lengths is None:
            raise UserError("ipo: length_normalized=True needs chosen_lengths and rejected_lengths")
        chosen_ratios = chosen_ratios / chosen_lengths
        rejected_ratios = rejected_ratios / rejected_lengths
    losses = (chosen_ratios - rejected_ratios - 1 / (2 * beta)) ** 2
    return losses, implicit_rewards(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)


def implicit_rewards(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float,
) -> dict[str, Float[Array, "*batch"]]:
    """Per-pair metrics under TRL's names, float32 and without gradient.

    `rewards/chosen` = β(log π(y_w|x) - log π_ref(y_w|x)) and `rewards/rejected` the same of y_l (Rafailov et al. 2023,
    below eq. 7), `rewards/margins` their difference, `rewards/accuracies` 1 where the chosen reward is strictly the
    larger, `logps/chosen` and `logps/rejected` the policy's summed log-probabilities.
    """
    chosen_logps, rejected_logps = jax.lax.stop_gradient((chosen_logps, rejected_logps))
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
