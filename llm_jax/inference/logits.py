"""From a model's logits to the distribution that is sampled: one function for every decoding path."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_jax.inference.config import SamplingParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowParams:
    """`SamplingParams` as one array entry per row, so that one compiled program serves every mix of requests."""

    temperature: Float[Any, "B"]
    top_k: Int[Any, "B"]
    top_p: Float[Any, "B"]
    min_p: Float[Any, "B"]
    repetition_penalty: Float[Any, "B"]


def row_params(params: Sequence[SamplingParams]) -> RowParams:
    """One row per entry, float32 and int32, on the host until a compiled function takes them."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(p, name) for p in params], dtype)

    return RowParams(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
    )


def penalize(logits: Float[Array, "B V"], rows: RowParams, seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
    """Repetition penalty of CTRL (Keskar et al. 2019, §4.1, with the sign fix of transformers): float32[B, V].

    The logit of a seen token is divided by the penalty where positive and multiplied by it where negative.
    """
    logits = logits.astype(jnp.float32)
    if seen is None:
        return logits
    penalty = rows.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def transform_logits(
    logits: Float[Array, "B V"], rows: RowParams, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """Logits of the distribution that is sampled: float32[B, V], the largest of each row 0, dropped tokens -inf.

    The order is fixed: repetition penalty, temperature, min-p, top-k, top-p; each step sees the distribution that
    the one before it left (renormalised). Rows with temperature 0 put all mass on the likeliest token after the
    penalty, the lowest id among equals. `seen` marks the tokens that the penalty applies to; None applies none.

    min-p keeps tokens with p >= min_p * max p (Nguyen et al. 2024); top-p the smallest set of likeliest tokens whose
    total reaches top_p (Holtzman et al. 2020). Tokens as likely as the last one kept by top-k or top-p are kept too,
    so that the result does not depend on the order of the vocabulary.
    """
    penalized = penalize(logits, rows, seen)
    peak = jnp.max(penalized, axis=-1, keepdims=True)
    greedy = rows.temperature[:, None] == 0
    # The peak is taken off before the division: a tiny temperature sends the others to -inf, never the peak to inf.
    scaled = (penalized - peak) / jnp.where(greedy, 1.0, rows.temperature[:, None])
    scaled = jnp.where(scaled >= jnp.log(rows.min_p)[:, None], scaled, -jnp.inf)
    vocab_size = logits.shape[-1]
    some_k, some_p = jnp.any((rows.top_k > 0) & (rows.top_k < vocab_size)), jnp.any(rows.top_p < 1)
    # Searching the thresholds is the dear part; it is skipped at run time where no row asks for it.
    scaled = jax.lax.cond(some_k, _top_k, lambda z, _: z, scaled, rows.top_k)
    scaled = jax.lax.cond(some_p, _top_p, lambda z, _: z, scaled, rows.top_p)
    likeliest = jnp.argmax(penalized, axis=-1)[:, None]
    one_hot = jnp.where(jnp.arange(vocab_size) == likeliest, 0.0, -jnp.inf)
    return jnp.where(greedy, one_hot, scaled)


def _top_k(logits: Float[Array, "B V"], top_k: Int[Array, "B"]) -> Float[Array, "B V"]:
    k = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
    return _keep_likeliest(logits, jnp.ones_like(logits), k.astype(jnp.float32))


def _top_p(logits: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
    mass = jnp.exp(logits)
    wanted = top_p * jnp.sum(mass, axis=-1)
    # Rounding must not drop anything at top_p = 1.
    return _keep_likeliest(logits, mass, jnp.where(top_p < 1, wanted, jnp.inf))


def _keep_likeliest(
    logits: Float[Array, "B V"], measure: Float[Array, "B V"], wanted: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Drops all but the likeliest tokens whose measures add up to `wanted`; logits are at most 0.

    The threshold is found bit by bit and not by sorting, which costs many times more on every backend: floats of one
    sign are ordered as their bits are, so that 31 halvings of the integers below infinity end at the exact logit.
    """
    depth = jnp.abs(logits)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(jnp.where(depth <= threshold[:, None], measure, 0.0), axis=-1) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros(logits.shape[:1], jnp.int32)
    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    _, high = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, infinity)))
    threshold = jax.lax.bitcast_convert_type(high, jnp.float32)
    return jnp.where(depth <= threshold[:, None], logits, -jnp.inf)
