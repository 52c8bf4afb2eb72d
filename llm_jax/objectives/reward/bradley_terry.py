"""The Bradley-Terry loss of reward models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bradley_terry(
    chosen_rewards: Float[Array, "*batch"],
    rejected_rewards: Float[Array, "*batch"],
    margin: Float[Array, "*batch"] | float = 0.0,
    center_rewards_coefficient: float | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Loss of each pair of rewards: eq. 1 of Ouyang et al. 2022 (arXiv:2203.02155, "InstructGPT") for K = 2.

        loss = -log σ(r_w - r_l - m) + c (r_w + r_l)²

    Args:
        chosen_rewards, rejected_rewards: scalar rewards, float32, any shape, one entry per pair.
        margin: m, by how much the chosen answer is better; inside σ as in Touvron et al. 2023 (Llama 2,
            arXiv:2307.09288, eq. 2), TRL and OpenRLHF.
        center_rewards_coefficient: c, the pull of the rewards to mean 0 (Eisenstein et al. 2023, arXiv:2312.09244,
            which advises 0.01); None or 0: none.

    Returns:
        float32 losses of the same shape, not reduced, and per-pair metrics without gradient under TRL's names:
        `accuracy` (1 where the chosen reward is strictly the larger, whatever the margin), `margin`, `mean_reward`,
        and `min_reward` and `max_reward` of the two: TRL logs the least and the largest of the whole batch.
    """
    losses = -jax.nn.log_sigmoid(chosen_rewards - rejected_rewards - margin)
    if center_rewards_coefficient:
        losses = losses + center_rewards_coefficient * (chosen_rewards + rejected_rewards) ** 2
    metrics = {
        "accuracy": (chosen_rewards > rejected_rewards).astype(jnp.float32),
        "margin": chosen_rewards - rejected_rewards,
        "mean_reward": (chosen_rewards + rejected_rewards) / 2,
        "min_reward": jnp.minimum(chosen_rewards, rejected_rewards),
        "max_reward": jnp.maximum(chosen_rewards, rejected_rewards),
    }
    return losses, jax.lax.stop_gradient(metrics)
