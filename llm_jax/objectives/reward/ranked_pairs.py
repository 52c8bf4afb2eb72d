"""All pairs of a ranking, each by Bradley-Terry."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def ranked_pairs(
    rewards: Float[Array, "*batch k"], present: Bool[Array, "*batch k"] | None = None
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Loss of each ranking: the mean over its pairs, eq. 1 of Ouyang et al. 2022 (arXiv:2203.02155, "InstructGPT").

        loss = -1 / C(k, 2) * sum over i < j of log σ(r_i - r_j)

    Args:
        rewards: scalar rewards, float32, answers from best to worst on the last axis.
        present: False for the answers that a ranking shorter than k does not have; its own number of pairs divides.

    Returns:
        float32 losses [*batch], not reduced, 0 for a ranking of less than two; and `ranking_metrics`.
    """
    present = jnp.ones(rewards.shape, bool) if present is None else present
    losses = -jax.nn.log_sigmoid(rewards[..., :, None] - rewards[..., None, :])
    return _pair_mean(losses, present), ranking_metrics(rewards, present)


def ranking_metrics(
    rewards: Float[Array, "*batch k"], present: Bool[Array, "*batch k"]
) -> dict[str, Float[Array, "*batch"]]:
    """Per ranking, without gradient: `accuracy`, the share of its pairs that the rewards order as it does, `margin`,
    the mean difference of a pair's rewards, and `mean_reward`, `min_reward`, `max_reward` of its answers (TRL's names).
    """
    rewards = jax.lax.stop_gradient(rewards)
    differences = rewards[..., :, None] - rewards[..., None, :]
    return {
        "accuracy": _pair_mean((differences > 0).astype(jnp.float32), present),
        "margin": _pair_mean(differences, present),
        "mean_reward": jnp.where(present, rewards, 0.0).sum(-1) / jnp.maximum(present.sum(-1), 1),
        "min_reward": jnp.where(present, rewards, jnp.inf).min(-1),
        "max_reward": jnp.where(present, rewards, -jnp.inf).max(-1),
    }


def _pair_mean(values: Float[Array, "*batch k k"], present: Bool[Array, "*batch k"]) -> Float[Array, "*batch"]:
    """Mean over the pairs i < j of answers that are there."""
    pairs = jnp.triu(present[..., :, None] & present[..., None, :], 1)
    return jnp.where(pairs, values, 0.0).sum((-2, -1)) / jnp.maximum(pairs.sum((-2, -1)), 1)
