"""What a model thinks of given next tokens, without the logits of the whole batch and with the vocabulary cut."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax import kernels
from llm_jax.base.errors import UserError
from llm_jax.models.decoder import Decoder
from llm_jax.sharding import axis_index, axis_max, axis_size, axis_sum, on_shards

OUTPUTS = {
    "logps": ("target_logit", "lse"),
    "lse": ("lse",),
    "entropy": ("lse", "expected_logit"),
    "mean_logit": ("sum_logit",),
    "argmax": ("argmax", "max"),
    "log_sum_sq_probs": ("lse", "lse2"),
}
"""Each output, and what it takes of every shard of the vocabulary."""
ROWS = ("batch", "length")


def token_scores(
    decoder: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    outputs: Sequence[str] = ("logps",),
) -> dict[str, Array]:
    """`outputs` of the prediction of `targets[b, t]` from `hidden[b, t]`, [B, T] each: float32, `argmax` int32.

    The decoder has its parameters bound. Logits are made in chunks of tokens; under a tensor axis each shard makes
    those of its part of the vocabulary, and single numbers per token are exchanged. False in `mask`: no work, value 0,
    no gradient. Names as in `kernels.linear_cross_entropy`; raises UserError for others.
    """
    for name in outputs:
        if name not in OUTPUTS:
            raise UserError(f"{name!r} is not an output of token_scores (known: {', '.join(OUTPUTS)})")
    parts = tuple(sorted({part for name in outputs for part in OUTPUTS[name]}))

    def scores(hidden: Array, head: Array, targets: Array, mask: Array) -> dict[str, Array]:
        size = head.shape[1]
        start = axis_index("vocab") * size
        flat = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1) - start, mask.reshape(-1))
        local = kernels.partial_linear_cross_entropy(flat[0], head, flat[1], mask=flat[2], outputs=parts)
        found = combine(local, tuple(outputs), start, size * axis_size("vocab"))
        return {name: jnp.where(mask, x.reshape(mask.shape), 0) for name, x in found.items()}

    run = on_shards(scores, ((*ROWS, "embed"), ("embed", "vocab"), ROWS, ROWS), dict.fromkeys(outputs, ROWS))
    return run(hidden, decoder.head_weight(), targets, mask)


def combine(local: dict[str, Array], outputs: Sequence[str], start: Array, vocab_size: int) -> dict[str, Array]:
    """Outputs from each shard's own sums; the shard's first token is `start`. Runs inside `on_shards`.

    With local log-sum-exps l_s: lse = log sum_s exp(l_s), and a mean under the softmax is the mean over shards of
    theirs, weighted by exp(l_s - lse).
    """

    def logsumexp(x: Array) -> Array:
        largest = axis_max(x, "vocab")
        return largest + jnp.log(axis_sum(jnp.exp(x - largest), "vocab"))

    lse = logsumexp(local["lse"]) if "lse" in local else jnp.zeros(())
    out: dict[str, Array] = {}
    for name in outputs:
        if name == "lse":
            out[name] = lse
        elif name == "logps":
            out[name] = axis_sum(local["target_logit"], "vocab") - lse
        elif name == "entropy":
            share = jnp.exp(local["lse"] - lse)
            out[name] = lse - axis_sum(share * local["expected_logit"], "vocab")
        elif name == "mean_logit":
            out[name] = axis_sum(local["sum_logit"], "vocab") / vocab_size
        elif name == "log_sum_sq_probs":
            out[name] = logsumexp(local["lse2"]) - 2 * lse
        elif name == "argmax":
            best = axis_max(local["max"], "vocab")
            mine = jnp.where(local["max"] == best, local["argmax"] + start, vocab_size)
            out[name] = -axis_max(-mine, "vocab")  # the first of equals
    return out
