"""What a model thinks of the tokens of rows: per target token, and summed per answer of a pair.

Rows are packed: several documents share a window, each its own segment (`segment_ids` from 1, 0 is padding).
`loss_mask` marks the tokens that are targets themselves, so position t, which predicts token t + 1, counts where token
t + 1 is marked and belongs to the same document. All functions are pure and run inside jit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from llm_jax import objectives
from llm_jax.models.decoder import Decoder
from llm_jax.models.head import token_scores
from llm_jax.models.mtp import ahead, same_document
from llm_jax.training.terms import Rows


def next_tokens(rows: Rows, by: int = 1) -> tuple[Int[Array, "*batch T"], Bool[Array, "*batch T"]]:
    """Each position's target (the token `by` places on; 0 beyond the window's end) and whether it is one.

    The first token of a document is never a target: nothing of its document precedes it.
    """
    return ahead(rows["tokens"], by), (ahead(rows["loss_mask"], by) != 0) & same_document(rows["segment_ids"], by)


def target_counts(rows: Rows, by: int = 1) -> Integer[Array, ""]:
    """Number of target tokens, `by` places on, in rows with any leading axes (microbatches, batch)."""
    return next_tokens(rows, by)[1].sum()


def before_targets(rows: Rows) -> Bool[Array, "*batch T"]:
    """The tokens before the first target of their document: what a prefix language model reads from both sides."""
    targets = jnp.cumsum(rows["loss_mask"], axis=-1, dtype=jnp.int32)
    # A document's first token is no target, so there it is the count of all documents before.
    earlier = jax.lax.cummax(jnp.where(rows["positions"] == 0, targets, 0), axis=targets.ndim - 1)
    return (targets == earlier) & (rows["segment_ids"] != 0)


def run_rows(
    decoder: Decoder, rows: Rows, *, further: bool = False, **arguments: Any
) -> tuple[Float[Array, "B T D"], list[Float[Array, "B T D"]], dict[str, Array]]:
    """A decoder over rows: its states; with `further` those for the tokens after the next one; and the statistics of
    all routers that took part, `[layers, ...]` each. `arguments` go to the decoder's call; `layer_inputs` among them
    have the layers for further tokens behind the others."""
    tokens, positions, segment_ids = (rows[name] for name in ("tokens", "positions", "segment_ids"))
    layers, inputs = decoder.config.num_layers, arguments.pop("layer_inputs", None)
    of_layers = None if inputs is None else jax.tree.map(lambda x: x[:layers], inputs)
    if decoder.config.prefix_lm:
        arguments["prefix"] = before_targets(rows)
    if "visible" in rows:
        arguments["visible"] = rows["visible"]
    hidden, _, aux = decoder(tokens, positions, segment_ids, layer_inputs=of_layers, **arguments)
    routers = aux.get("experts", {})
    if not further:
        return hidden, [], routers
    assert "visible" not in rows, "layers for further tokens read whole documents"
    inputs = None if inputs is None else jax.tree.map(lambda x: x[layers:], inputs)
    states, own = decoder.further(hidden, tokens, positions, segment_ids, inputs)
    return hidden, states, {name: jnp.concatenate([x, own[name]]) if own else x for name, x in routers.items()}


def score_rows(
    decoder: Decoder,
    rows: Rows,
    outputs: tuple[str, ...],
    *,
    further: bool = False,
    also: Bool[Array, "B T"] | None = None,
    **arguments: Any,
) -> tuple[dict[str, Any], Bool[Array, "B T"]]:
    """Runs a decoder with its parameters bound over rows; `outputs` of each position's prediction, and where it counts.

    Outputs are those of `kernels.linear_cross_entropy` (`logps`, `entropy`, `mean_logit`, ...), float32[B, T], and
    `is_top1`, bool[B, T]: whether the target is the most likely token. 0 and False where the mask is false. Of a model
    with experts also `experts`, its routers' statistics. With `further` also `logps_further`, a list of what is said
    of the targets 2, 3, … places on, 0 where there is none. `also` marks positions that are scored beside those that
    count. `arguments` go to the decoder's call.
    """
    targets, mask = next_tokens(rows)
    scored = mask if also is None else mask | also
    hidden, states, routers = run_rows(decoder, rows, further=further, **arguments)
    wanted = tuple("argmax" if name == "is_top1" else name for name in outputs)
    scores: dict[str, Any] = dict(token_scores(decoder, hidden, targets, scored, outputs=wanted))
    if "is_top1" in outputs:
        scores["is_top1"] = scored & (scores.pop("argmax") == targets)
    if routers:
        scores["experts"] = routers
    if further:
        scores["logps_further"] = [
            token_scores(decoder, state, *next_tokens(rows, by))["logps"] for by, state in enumerate(states, start=2)
        ]
    return scores, mask


def sum_by_answer(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], rows: Rows
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Sums of a per-position value over the chosen and over the rejected answer of each pair of a row; 0 for no pair.

    A masked comparison with each pair's number, not a scatter: the sum keeps its order, costs B·P·T additions that fuse
    into one loop, and is partitioned over `data` like any elementwise operation.
    """
    pairs = jnp.arange(1, rows["pair_index"].shape[-1] + 1, dtype=jnp.int32)
    of_pair = rows["pair_id"][:, None, :] == pairs[:, None]
    side, counted = rows["side"][:, None, :], mask[:, None, :]
    chosen, rejected = (
        jnp.where(of_pair & (side == which) & counted, values[:, None, :], 0.0).sum(axis=-1) for which in (1, 2)
    )
    return chosen, rejected


def sum_by_segment(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], count: int
) -> Float[Array, "B P"]:
    """Sums of a per-position value over each of the first `count` segments of a row; 0 for none. As `sum_by_answer`."""
    of_segment = segment_ids[:, None, :] == jnp.arange(1, count + 1, dtype=jnp.int32)[:, None]
    return jnp.where(of_segment & mask[:, None, :], values[:, None, :], 0.0).sum(axis=-1)


def of_segment(values: Bool[Array, "B P"], segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """The other way: each position's value, given one of each segment; False where there is none."""
    numbers = jnp.arange(1, values.shape[-1] + 1, dtype=jnp.int32)
    return ((segment_ids[:, None, :] == numbers[:, None]) & values[..., None]).any(axis=1)


def of_answer(chosen: Float[Array, "B P"], rejected: Float[Array, "B P"], rows: Rows) -> Float[Array, "B T"]:
    """The other way: each position's value, given one of each answer; 0 where there is no pair."""
    pairs = jnp.arange(1, rows["pair_index"].shape[-1] + 1, dtype=jnp.int32)
    side = rows["side"][:, None, :]
    values = jnp.where(side == 1, chosen[..., None], rejected[..., None])
    return jnp.where(rows["pair_id"][:, None, :] == pairs[:, None], values, 0.0).sum(axis=1)


def without_tails(
    logps: Float[Array, "B T"], mask: Bool[Array, "B T"], rows: Rows, ld_alpha: float
) -> Float[Array, "B T"]:
    """`objectives.ld_dpo` of packed pairs: an answer's tokens beyond the length of the shorter one weigh less."""
    counted = mask.astype(jnp.float32)
    chosen, rejected = sum_by_answer(counted, mask, rows)
    # How many answer tokens of the row come before each answer.
    before = jnp.cumsum(chosen + rejected, axis=-1) - (chosen + rejected)
    place = jnp.cumsum(counted, axis=-1) - 1 - of_answer(before, before + chosen, rows)
    shared = jnp.minimum(chosen, rejected)
    return objectives.ld_dpo(
        logps, place.astype(jnp.int32), of_answer(shared, shared, rows).astype(jnp.int32), ld_alpha
    )


def answer_logps(decoder: Decoder, rows: Rows, ld_alpha: float | None = None) -> dict[str, Float[Array, "B P"]]:
    """Summed log-probabilities of the two answers of each pair: `chosen_logps` and `rejected_logps`, 0 for no pair.

    Under the reference model these are what a preference job stores beside its rows. `ld_alpha` as for
    `without_tails`; None sums all tokens.
    """
    scores, mask = score_rows(decoder, rows, ("logps",))
    logps = scores["logps"] if ld_alpha is None else without_tails(scores["logps"], mask, rows, ld_alpha)
    chosen, rejected = sum_by_answer(logps, mask, rows)
    return {"chosen_logps": chosen, "rejected_logps": rejected}


def unpaired_logps(decoder: Decoder, rows: Rows) -> dict[str, Float[Array, "B P"]]:
    """Summed log-probabilities of each unpaired answer, `logps`, and, where rows have them, of the answer given to
    another prompt that stands beside it, `kl_logps`; 0 for no answer."""
    found = {"logps": mismatched_logps(decoder, rows, "")}
    return found | ({"kl_logps": mismatched_logps(decoder, rows)} if "kl_tokens" in rows else {})


def mismatched_logps(decoder: Decoder, rows: Rows, prefix: str = "kl_") -> Float[Array, "B P"]:
    """Summed log-probabilities of the answers in the fields that begin with `prefix`."""
    beside = {name: rows[prefix + name] for name in ("tokens", "segment_ids", "positions", "loss_mask")}
    scores, mask = score_rows(decoder, beside, ("logps",))
    return sum_by_segment(scores["logps"], mask, beside["segment_ids"], rows["answer_index"].shape[-1])
