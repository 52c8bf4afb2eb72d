"""Self-Play Preference Optimization with certain wins."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.objectives.preference.sppo import sppo


def sppo_hard(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 1e-3,
    halved: bool = False,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """SPPO where the chosen answer always wins and the rejected one never: TRL's `sppo_hard`.

        loss = (r_w - ½ / β)² + (r_l + ½ / β)²        r = log π(y|x) - log π_ref(y|x)

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, the inverse of the paper's step size η.
        halved: the mean over the two answers, as in the authors' code (`sppo`); False is TRL's, who named this loss.

    Returns, Raises: as for `sppo`.
    """
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sppo(*logps, jnp.ones_like(chosen_logps), jnp.zeros_like(rejected_logps), beta, halved)
