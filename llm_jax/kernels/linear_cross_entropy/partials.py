"""Sums over a part of the vocabulary of which the statistics are made.

With w = exp(z - top): `top` the largest logit, `total` Σ w, `weighted` Σ w z, `squares` Σ w², `sum` Σ z, `best` the
first column of the largest, `target` the target's logit, or 0 where it is in another part.
"""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEEDS = {
    "expected_logit": "weighted",
    "sum_logit": "sum",
    "lse2": "squares",
    "argmax": "best",
    "target_logit": "target",
}
"""What a statistic needs besides `top` and `total`."""


def partials_of(
    statistics: Iterable[str], logits: Float[Array, "c V"], targets: Int[Array, " c"]
) -> dict[str, Float[Array, " c"]]:
    """Of the columns at hand; targets and `best` count from the first of them."""
    vocab = logits.shape[1]
    top = logits.max(1)
    weights = jnp.exp(logits - top[:, None])

    def target() -> Array:
        here = (targets >= 0) & (targets < vocab)
        at_target = jnp.take_along_axis(logits, jnp.where(here, targets, 0)[:, None], axis=1)[:, 0]
        return jnp.where(here, at_target, 0.0)

    every: dict[str, Callable[[], Array]] = {
        "weighted": lambda: jnp.sum(weights * logits, 1),
        "sum": lambda: logits.sum(1),
        "squares": lambda: jnp.sum(weights**2, 1),
        # As a reduction that vectorises.
        "best": lambda: jnp.where(logits == top[:, None], jnp.arange(vocab), vocab - 1).min(1),
        "target": target,
    }
    wanted = [NEEDS[name] for name in statistics if name in NEEDS]
    return {"top": top, "total": weights.sum(1)} | {name: every[name]() for name in wanted}


def merged(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    """Of two parts together, of which `a` is the earlier one; `best` counts from the same column in both."""
    top = jnp.maximum(a["top"], b["top"])
    at_a, at_b = (jnp.exp(x["top"] - top) for x in (a, b))
    every: dict[str, Callable[[], Array]] = {
        "top": lambda: top,
        "total": lambda: at_a * a["total"] + at_b * b["total"],
        "weighted": lambda: at_a * a["weighted"] + at_b * b["weighted"],
        "squares": lambda: at_a**2 * a["squares"] + at_b**2 * b["squares"],
        "sum": lambda: a["sum"] + b["sum"],
        "best": lambda: jnp.where(b["top"] > a["top"], b["best"], a["best"]),
        "target": lambda: a["target"] + b["target"],
    }
    return {name: every[name]() for name in a}


def statistic(name: str, parts: dict[str, Array]) -> Array:
    """A statistic of all that `parts` were summed over."""
    match name:
        case "lse":
            return parts["top"] + jnp.log(parts["total"])
        case "expected_logit":
            return parts["weighted"] / parts["total"]
        case "lse2":
            return 2.0 * parts["top"] + jnp.log(parts["squares"])
        case "max":
            return parts["top"]
        case _:
            return parts[NEEDS[name]]
