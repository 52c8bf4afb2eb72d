"""What a model thinks of given next tokens, without the logits of the whole batch and with the vocabulary cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax import kernels
from llm_jax.kernels.linear_cross_entropy.spec import needed_statistics, outputs_from_statistics
from llm_jax.models.decoder import Decoder
from llm_jax.sharding import axis_index, axis_max, axis_size, axis_sum, on_shards

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
    no gradient. Names as in `kernels.linear_cross_entropy`, which says what is raised for others; log-probabilities of
    targets outside the vocabulary are NaN.
    """
    outputs = tuple(outputs)
    names = needed_statistics(outputs)
    if "argmax" in names:
        names = (*names, "max")

    def scores(hidden: Array, head: Array, targets: Array, mask: Array) -> dict[str, Array]:
        size = head.shape[1]
        start, vocab = axis_index("vocab") * size, size * axis_size("vocab")
        options = {"scale": decoder.config.logit_scale, "softcap": decoder.config.logit_softcap}
        local = kernels.partial_linear_cross_entropy(hidden, head, targets - start, mask=mask, outputs=names, **options)
        whole = across_shards(local, start, vocab)
        if "target_logit" in whole:
            known = (targets >= 0) & (targets < vocab)
            whole["target_logit"] = jnp.where(known, whole["target_logit"], jnp.nan)
        found = outputs_from_statistics(whole, vocab=vocab, outputs=outputs)
        return {name: jnp.where(mask, value, 0) for name, value in found.items()}

    run = on_shards(scores, ((*ROWS, "embed"), ("embed", "vocab"), ROWS, ROWS), dict.fromkeys(outputs, ROWS))
    return run(*decoder.head_inputs(hidden), targets, mask)


def across_shards(local: Mapping[str, Array], start: Array, vocab: int) -> dict[str, Array]:
    """Statistics over the whole vocabulary from each shard's own, whose first token is `start`. Inside `on_shards`.

    With local log-sum-exps l_s: lse = log sum_s exp(l_s), and a mean under the softmax is the sum over shards of
    theirs, weighted by exp(l_s - lse).
    """

    def logsumexp(x: Array) -> Array:
        largest = axis_max(x, "vocab")
        return largest + jnp.log(axis_sum(jnp.exp(x - largest), "vocab"))

    lse = logsumexp(local["lse"])
    whole = {"lse": lse}
    # A fixed order: processes must meet in the same collectives.
    for name in ("target_logit", "sum_logit"):
        if name in local:
            whole[name] = axis_sum(local[name], "vocab")
    if "expected_logit" in local:
        whole["expected_logit"] = axis_sum(jnp.exp(local["lse"] - lse) * local["expected_logit"], "vocab")
    if "lse2" in local:
        whole["lse2"] = logsumexp(local["lse2"])
    if "argmax" in local:
        best = axis_max(local["max"], "vocab")
        mine = jnp.where(local["max"] == best, local["argmax"] + start, vocab)
        whole["argmax"] = -axis_max(-mine, "vocab")  # the first of equals
    return whole
