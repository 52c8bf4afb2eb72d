"""Anchored Preference Optimization on single answers."""

from jaxtyping import Array, Bool, Float

from llm_jax.objectives.preference.kto import kto
from llm_jax.objectives.preference.shared import check_positive, labelled_rewards


def apo_zero_unpaired(
    logps: Float[Array, "*batch"],
    ref_logps: Float[Array, "*batch"],
    labels: Bool[Array, "*batch"],
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """APO-zero of each answer with a label, TRL's form of eq. 7 of D'Oosterlinck et al. 2024: `kto` at z = 0.

    Args, Returns, Raises: as for `kto`; the metrics are those of `labelled_rewards` alone.
    """
    check_positive("apo_zero_unpaired", beta=beta)
    losses, _ = kto(logps, ref_logps, labels, 0.0, beta, desirable_weight, undesirable_weight)
    return losses, labelled_rewards(logps, ref_logps, labels, beta)
