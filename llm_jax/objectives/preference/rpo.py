"""DPO with the likelihood of the chosen answer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from llm_jax.base.errors import UserError
from llm_jax.objectives.preference.dpo import dpo


def rpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    ref_chosen_logps: Float[Array, "*batch"],
    ref_rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    rpo_alpha: float = 1.0,
    chosen_lengths: Num[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Iterative RPO's loss of each pair, eq. 1 of Pang et al. 2024 (arXiv:2404.19733).

        loss = -log σ(β d) - α log π(y_w|x) / |y_w|        d as for `dpo`

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: summed log-probabilities in nats, float32,
            any shape, one entry per pair (as for `dpo`).
        beta: β > 0, strength of the pull to the reference.
        rpo_alpha: α, weight of the likelihood of the chosen answer (steps and result together).
        chosen_lengths: tokens per chosen answer, the one that ends it included, same shape; needed.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `implicit_rewards` per pair, and `nll_loss`.

    Raises:
        UserError: beta not positive, or lengths missing.

    TRL writes it as `loss_type=["sigmoid", "sft"]`, which divides by the tokens of all chosen answers together
    (`sft_pair`); the paper divides each by its own.
    """
    if chosen_lengths is None:
        raise UserError("rpo needs chosen_lengths")
    losses, metrics = dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    nll = -chosen_logps / jnp.maximum(chosen_lengths, 1)
    return losses + rpo_alpha * nll, metrics | {"nll_loss": jax.lax.stop_gradient(nll)}
