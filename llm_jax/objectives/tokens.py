"""Negative log-likelihood of target tokens: supervised fine-tuning, and pretraining where every token is a target."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sft(
    logps: Float[Array, "*batch"],
    mask: Bool[Array, "*batch"],
    entropy: Float[Array, "*batch"] | None = None,
    is_top1: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Loss of each token, -log π(y_t | y_<t) where `mask`, exactly 0 elsewhere.

    Summed and divided by the number of targets of the *whole* batch (all microbatches and devices) it is the token mean
    that TRL, transformers and Tunix take; a mean of microbatch means is another loss.

    Args:
        logps: log-probability of each position's target in nats, float32, any shape.
        mask: which positions have a target.
        entropy: of the predicted distribution in nats, for the metric.
        is_top1: whether the target is the most likely token, for the metric.

    Returns:
        float32 losses of the same shape, not reduced, and per-token metrics without gradient under TRL's names, zero
        where masked: `entropy`, `mean_token_accuracy`, each where its argument is given.
    """
    losses = jnp.where(mask, -logps, 0.0)
    metrics = {}
    if entropy is not None:
        metrics["entropy"] = jnp.where(mask, jax.lax.stop_gradient(entropy), 0.0)
    if is_top1 is not None:
        metrics["mean_token_accuracy"] = (mask & is_top1).astype(jnp.float32)
    return losses, metrics


def dft(
    logps: Float[Array, "*batch"],
    mask: Bool[Array, "*batch"],
    entropy: Float[Array, "*batch"] | None = None,
    is_top1: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """Dynamic Fine-Tuning: loss of each token, Wu et al. 2025 (arXiv:2508.05629).

        loss = -sg(π(y_t|y_<t)) log π(y_t|y_<t) where `mask`, exactly 0 elsewhere; sg: without gradient

    Args, Returns: as for `sft`; divided by the number of targets of the whole batch it is TRL's `dft`.
    """
    losses, metrics = sft(logps, mask, entropy, is_top1)
    return losses * jax.lax.stop_gradient(jnp.exp(-losses)), metrics
