"""Identity Preference Optimization."""

from jaxtyping import Array, Float, Num

from llm_jax.objectives.preference.divergence import FDivergence, pair_scores
from llm_jax.objectives.preference.shared import check_positive, implicit_rewards, token_means


def ipo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    length_normalized: bool = True,
    chosen_lengths: Num[Array, "*batch"] | None = None,
    rejected_lengths: Num[Array, "*batch"] | None = None,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Identity Preference Optimization: loss of each pair, eq. 17 of Azar et al. 2023 (arXiv:2310.12036).

        h = (log π(y_w|x) - log π_ref(y_w|x)) - (log π(y_l|x) - log π_ref(y_l|x))
        loss = (h - 1 / (2 β))²

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, the paper's τ; `beta` here as everywhere else.
        length_normalized: divide each log-ratio by its answer's number of tokens, which the authors confirmed to be
            what they meant (TRL, HALOs and LLaMA-Factory do it; HALOs counts the tokens whose log-ratio is not 0, which
            is 0/0 at the reference); False is the equation as printed, which the DPO authors' code, OpenRLHF and TRL's
            online DPO compute.
        chosen_lengths, rejected_lengths: tokens per answer, the one that ends it included, same shape; used only
            when length_normalized, and needed then.
        f_divergence_type, f_alpha_divergence_coef: another divergence than reverse KL (`f_divergence`), as TRL has it.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair (of the sums,
        whatever the normalization, as TRL logs them).

    Raises:
        UserError: beta not positive, or lengths missing where they are needed.
    """
    check_positive("ipo", beta=beta)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = pair_scores(*logps, f_divergence_type, f_alpha_divergence_coef, power=2)
    if length_normalized:
        lengths = (chosen_lengths, rejected_lengths)
        chosen, rejected = token_means("ipo: length_normalized=True", chosen, rejected, *lengths)
    return (chosen - rejected - 1 / (2 * beta)) ** 2, implicit_rewards(*logps, beta)
