"""Self-Play Fine-Tuning."""

from jaxtyping import Array, Float

from llm_jax.objectives.preference.dpo import dpo


def spin(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """SPIN: loss of each pair, Chen et al. 2024 (arXiv:2401.01335), with ℓ(t) = log(1 + exp(-t)).

        loss = ℓ(β (log π(y|x) - log π_t(y|x)) - β (log π(y'|x) - log π_t(y'|x)))

    the loss of `dpo` on other data: y, the chosen answer, is a demonstration, y' the opponent's own answer, and the
    reference is that opponent π_t, the policy of the round before. β is the paper's λ.

    Args, Returns, Raises: as for `dpo`.
    """
    return dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
