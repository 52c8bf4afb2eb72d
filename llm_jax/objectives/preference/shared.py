"""What the losses on preferences share: log-ratios, averages over tokens, checks of arguments, TRL's metrics."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from llm_jax.base.errors import UserError

Logps = Float[Array, "*batch"]
"""Log-probabilities of answers in nats, summed over their tokens (the one that ends it included, the prompt's not)."""
Lengths = Num[Array, "*batch"]
"""Tokens per answer, the one that ends it included."""


def log_ratios(logps: Logps, ref_logps: Logps) -> Logps:
    """log π(y|x) - log π_ref(y|x); the reference is a constant to the gradient."""
    return logps - jax.lax.stop_gradient(ref_logps)


def token_means(
    loss: str, chosen: Logps, rejected: Logps, chosen_lengths: Lengths | None, rejected_lengths: Lengths | None
) -> tuple[Logps, Logps]:
    """Values of both answers per token. An answer without tokens, as an absent pair has, is divided by 1.

    Raises:
        UserError: lengths are missing; `loss` is who needs them.
    """
    if chosen_lengths is None or rejected_lengths is None:
        raise UserError(f"{loss} needs chosen_lengths and rejected_lengths")
    return chosen / jnp.maximum(chosen_lengths, 1), rejected / jnp.maximum(rejected_lengths, 1)


def check_positive(loss: str, **arguments: float) -> None:
    """Raises UserError naming the loss and the argument that is not greater than 0."""
    for name, value in arguments.items():
        if not value > 0:
            raise UserError(f"{loss}: {name} must be greater than 0, not {value}")


def check_smoothing(loss: str, label_smoothing: float | Logps) -> None:
    """Raises UserError where the probability of a flipped label is not in [0, 0.5]; those of pairs, an array, are data,
    which are checked where they are read."""
    if isinstance(label_smoothing, float | int) and not 0 <= label_smoothing <= 0.5:
        raise UserError(f"{loss}: label_smoothing must lie in [0, 0.5], not {label_smoothing}")


def smoothed_logistic(logits: Logps, label_smoothing: float | Logps) -> Logps:
    """-(1 - ε) log σ(logits) - ε log σ(-logits): cross-entropy to a label that is flipped with probability ε."""
    losses = -jax.nn.log_sigmoid(logits)
    if not isinstance(label_smoothing, float | int) or label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * jax.nn.log_sigmoid(-logits)
    return losses


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
    chosen, rejected = beta * (chosen_logps - ref_chosen_logps), beta * (rejected_logps - ref_rejected_logps)
    return reward_metrics(chosen, rejected, chosen_logps, rejected_logps)


def reward_metrics(
    chosen_rewards: Logps, rejected_rewards: Logps, chosen_logps: Logps, rejected_logps: Logps
) -> dict[str, Float[Array, "*batch"]]:
    """The metrics of `implicit_rewards` from rewards, for a loss whose rewards are others."""
    return jax.lax.stop_gradient(
        {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(jnp.float32),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
    )


def labelled_rewards(
    logps: Float[Array, "*batch"],
    ref_logps: Float[Array, "*batch"],
    labels: Bool[Array, "*batch"],
    beta: float,
) -> dict[str, Float[Array, "*batch"]]:
    """Per-example metrics of unpaired answers under TRL's names, without gradient: `rewards/chosen` and `logps/chosen`
    where the label is True, `rewards/rejected` and `logps/rejected` where it is False, each exactly 0 elsewhere.

    TRL averages each over the examples with its label, and reports the difference of the averaged rewards as
    `rewards/margins`: a ratio of sums over the whole batch, which is left to the caller.
    """
    values = {"rewards": beta * (logps - ref_logps), "logps": logps}
    return jax.lax.stop_gradient(
        {
            f"{name}/{side}": jnp.where(labels == desirable, value, 0.0)
            for name, value in values.items()
            for side, desirable in (("chosen", True), ("rejected", False))
        }
    )
