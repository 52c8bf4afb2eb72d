"""Binary Classifier Optimization on single answers, and its reward shift."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.objectives.preference.shared import check_positive, labelled_rewards, log_ratios

Running = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""`chosen` and `rejected`: (mean reward, number of rewards) of all batches so far."""


def bco_unpaired(
    logps: Float[Array, "*batch"],
    ref_logps: Float[Array, "*batch"],
    labels: Bool[Array, "*batch"],
    delta: Float[Array, ""] | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """BCO: loss of each answer with a label, Jung et al. 2024 (arXiv:2404.04656).

        desirable:   -log σ(β r - δ)        r = log π(y|x) - log π_ref(y|x)
        undesirable: -log σ(-(β r - δ))

    Args:
        logps, ref_logps: summed log-probabilities in nats of each answer, the policy's and the reference's (a constant
            to the gradient), float32, any shape.
        labels: True where the answer is desirable.
        delta: the reward shift δ of the whole batch or of the run so far (`bco_delta`), a constant to the gradient.
        beta: β > 0, strength of the pull to the reference.
        desirable_weight, undesirable_weight: factors of the two losses, as in `kto`; the paper has none.

    Returns:
        float32 losses of the same shape, not reduced, and the metrics of `labelled_rewards` per example.

    Raises:
        UserError: beta not positive.

    The paper weights undesirable answers by how desirable prompts like theirs are (a classifier on embeddings); that
    weight belongs into the rows.
    """
    check_positive("bco_unpaired", beta=beta)
    shifted = beta * log_ratios(logps, ref_logps) - jax.lax.stop_gradient(delta)
    losses = -jax.nn.log_sigmoid(jnp.where(labels, shifted, -shifted))
    weights = jnp.where(labels, desirable_weight, undesirable_weight)
    return weights * losses, labelled_rewards(logps, ref_logps, labels, beta)


def bco_delta(
    logps: Float[Array, "*batch"],
    ref_logps: Float[Array, "*batch"],
    labels: Bool[Array, "*batch"],
    beta: float,
    present: Bool[Array, "*batch"] | None = None,
    running: Running | None = None,
) -> tuple[Float[Array, ""], Running]:
    """BCO's reward shift δ from the log-probabilities of the whole batch, and the means to go on from.

    δ = ½ (mean reward of desirable answers + mean reward of undesirable ones), reward = β(log π - log π_ref). Of pairs,
    give both sides, labels True and False.

    Args:
        logps, ref_logps, labels, beta: as for `bco_unpaired`, of all examples of the global batch.
        present: False where an example is padding and counts for nothing.
        running: what the batch before returned; the means are then over all batches so far, as the paper's
            moving average and TRL's former BCOTrainer have it. None: this batch alone.

    A label that no example has had yet has mean 0.
    """
    rewards = jax.lax.stop_gradient(beta * (logps - ref_logps))
    present = jnp.ones_like(labels) if present is None else present
    means = {}
    for side, chosen in (("chosen", True), ("rejected", False)):
        mean, count = (jnp.float32(0), jnp.float32(0)) if running is None else running[side]
        mine = present & (labels == chosen)
        total = count + mine.sum()
        means[side] = ((mean * count + jnp.where(mine, rewards, 0.0).sum()) / jnp.maximum(total, 1), total)
    return (means["chosen"][0] + means["rejected"][0]) / 2, means
