"""Losses that balance experts, and the update that balances them without a loss.

Each is a function of the sums that routers hand out (`models.router.Router`), added over the whole global batch. Such
sums are equal however the batch is cut into microbatches and shards, and so are these losses. For the gradient of one
microbatch, `assigned`, `tokens` and `sequences` are the whole batch's and the rest the microbatch's own: all losses but
Shazeer's two are linear in it. Of a layer that no token reaches each loss is 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def load_balance(
    assigned: Float[Array, "*layers E"], probability: Float[Array, "*layers E"], tokens: Float[Array, "*layers"]
) -> Float[Array, "*layers"]:
    """E Σ_e f_e P_e of each layer: Fedus et al. 2021 (arXiv:2101.03961), eq. 4-6, less its coefficient.

    f_e = assigned_e / tokens and P_e = probability_e / tokens. At perfect balance it is top_k (1 in Switch).

    transformers' `load_balancing_loss_func` (Mixtral, Qwen-MoE, OLMoE) pools all layers into one such loss: pass the
    three sums added over layers.
    """
    tokens = jnp.maximum(tokens, 1.0)[..., None]
    return assigned.shape[-1] * jnp.sum(assigned / tokens * probability / tokens, -1)


def sequence_balance(
    sequence_product: Float[Array, "*layers"], sequences: Float[Array, "*layers"], num: int, top_k: int
) -> Float[Array, "*layers"]:
    """Σ_e f_e P_e within each document, averaged over documents: DeepSeek-V2 (arXiv:2405.04434), eq. 23-25, and
    DeepSeek-V3 (arXiv:2412.19437), eq. 17-20, less their coefficient.

    f_e = E / (top_k T) · assigned_e and P_e = probability_e / T over a document of T tokens. 1 at perfect balance. V3's
    f counts choices as they are made, correction bias included, as its code does; its eq. 18 leaves the bias out.
    """
    return num / top_k * sequence_product / jnp.maximum(sequences, 1.0)


def router_z(z: Float[Array, "*layers"], tokens: Float[Array, "*layers"]) -> Float[Array, "*layers"]:
    """Mean over tokens of logsumexp(logits)²: ST-MoE (Zoph et al. 2022, arXiv:2202.08906), eq. 5."""
    return z / jnp.maximum(tokens, 1.0)


def importance(importance: Float[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """CV(importance)²: Shazeer et al. 2017 (arXiv:1701.06538), eq. 6-7, less its coefficient."""
    return _squared_variation(importance)


def load(load: Float[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """CV(load)² of the smooth load: Shazeer et al. 2017, appendix A, eq. 11, less its coefficient."""
    return _squared_variation(load)


def _squared_variation(x: Float[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """Variance (over E, not E - 1) by squared mean."""
    # The gradient divides by the square of this once more, which has to be a float32 too.
    return jnp.var(x, axis=-1) / jnp.maximum(jnp.square(jnp.mean(x, axis=-1)), 1e-12)


def bias_update(
    bias: Float[Array, "*layers E"], assigned: Float[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """The correction bias after a step: plus `rate` where an expert's load was below the mean, minus where above.

    Wang et al. 2024 (arXiv:2408.15664), algorithm 1; DeepSeek-V3, section 2.1.2 (rate 0.001).
    """
    error = jnp.mean(assigned, axis=-1, keepdims=True) - assigned
    return bias + rate * jnp.sign(error)
