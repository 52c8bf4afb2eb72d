"""Statistics of the logits of all tokens at once, as the formulas say. For tests and for reading."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels.linear_cross_entropy.spec import LossSpec


def supports(spec: LossSpec, platform: str) -> str | None:
    """Runs everything, everywhere, in memory M·V."""
    return None


def statistics(
    spec: LossSpec,
    hidden: Float[Array, "M D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " M"],
    mask: Bool[Array, " M"] | None,
) -> dict[str, Array]:
    """Differentiated by JAX."""
    head = head.astype(hidden.dtype)
    logits = spec.scale * jnp.matmul(
        hidden, head, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    here = (targets >= 0) & (targets < spec.vocab)
    at_target = jnp.take_along_axis(logits, jnp.where(here, targets, 0)[:, None], axis=1)[:, 0]
    every = {
        "target_logit": lambda: jnp.where(here, at_target, 0.0),
        "lse": lambda: jax.nn.logsumexp(logits, axis=1),
        "expected_logit": lambda: jnp.sum(jax.nn.softmax(logits, axis=1) * logits, axis=1),
        "sum_logit": lambda: jnp.sum(logits, axis=1),
        "lse2": lambda: jax.nn.logsumexp(2.0 * logits, axis=1),
        "argmax": lambda: jnp.argmax(logits, axis=1).astype(jnp.int32),
        "max": lambda: jax.lax.stop_gradient(jnp.max(logits, axis=1)),
    }
    made = {name: every[name]() for name in spec.statistics}
    return made if mask is None else {name: jnp.where(mask, x, jnp.zeros_like(x)) for name, x in made.items()}
