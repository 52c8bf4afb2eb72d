"""The Plackett-Luce loss of rankings."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.objectives.reward.ranked_pairs import ranking_metrics


def plackett_luce(
    rewards: Float[Array, "*batch k"], present: Bool[Array, "*batch k"] | None = None
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Loss of each ranking: minus the log of its probability under Plackett-Luce (Luce 1959, Plackett 1975).

        loss = - sum over i of (r_i - log(sum over j >= i of exp(r_j)))

    `bradley_terry` for two answers.

    Args:
        rewards: scalar rewards, float32, answers from best to worst on the last axis.
        present: False for the answers that a ranking shorter than k does not have, which come last.

    Returns:
        float32 losses [*batch], not reduced, 0 for a ranking of less than two; and `ranking_metrics`.
    """
    present = jnp.ones(rewards.shape, bool) if present is None else present
    rivals = jnp.triu(jnp.broadcast_to(present[..., None, :], (*rewards.shape, rewards.shape[-1])), 1)
    beaten = present & rivals.any(-1)
    # -log of a share as softplus of what the rivals are ahead: exact however far behind they are. Whoever has no rival
    # gets all of them, so that the gradient of what is thrown away is finite.
    ahead = rewards[..., None, :] - rewards[..., :, None]
    ahead = jax.nn.logsumexp(ahead, axis=-1, where=rivals | ~beaten[..., None])
    return jnp.where(beaten, jax.nn.softplus(ahead), 0.0).sum(-1), ranking_metrics(rewards, present)
