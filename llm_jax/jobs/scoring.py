"""What a model thinks of the tokens of rows: per target token, and summed per answer of a pair.

Rows are packed: several documents share a window, each its own segment (`segment_ids` from 1, 0 is padding).
`loss_mask` marks the tokens that are targets themselves, so position t, which predicts token t + 1, counts where token
t + 1 is marked and belongs to the same document. All functions are pure and run inside jit.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from llm_jax.models.decoder import Decoder
from llm_jax.models.head import token_scores
from llm_jax.training.terms import Rows


def next_tokens(
    tokens: Int[Array, "*batch T"], segment_ids: Int[Array, "*batch T"], loss_mask: Integer[Array, "*batch T"]
) -> tuple[Int[Array, "*batch T"], Bool[Array, "*batch T"]]:
    """Each position's target (the next token; 0 at the window's end) and whether it is one.

    The first token of a document is never a target: nothing of its document precedes it.
    """

    def next_of(x: Array) -> Array:
        return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)

    targets, next_segments, next_mask = (next_of(x) for x in (tokens, segment_ids, loss_mask))
    return targets, (next_mask != 0) & (next_segments == segment_ids) & (segment_ids != 0)


def target_counts(rows: Rows) -> Integer[Array, ""]:
    """Number of target tokens in rows with any leading axes (microbatches, batch)."""
    return next_tokens(rows["tokens"], rows["segment_ids"], rows["loss_mask"])[1].sum()


def score_rows(
    decoder: Decoder, rows: Rows, outputs: tuple[str, ...], **arguments: Any
) -> tuple[dict[str, Any], Bool[Array, "B T"]]:
    """Runs a decoder with its parameters bound over rows; `outputs` of each position's prediction, and where it counts.

    Outputs are those of `kernels.linear_cross_entropy` (`logps`, `entropy`, `mean_logit`, ...), float32[B, T], and
    `is_top1`, bool[B, T]: whether the target is the most likely token. 0 and False where the mask is false. Of a model
    with experts also `experts`, its routers' statistics. `arguments` go to the decoder's call.
    """
    targets, mask = next_tokens(rows["tokens"], rows["segment_ids"], rows["loss_mask"])
    hidden, _, aux = decoder(rows["tokens"], rows["positions"], rows["segment_ids"], **arguments)
    wanted = tuple("argmax" if name == "is_top1" else name for name in outputs)
    scores: dict[str, Any] = dict(token_scores(decoder, hidden, targets, mask, outputs=wanted))
    if "is_top1" in outputs:
        scores["is_top1"] = mask & (scores.pop("argmax") == targets)
    if "experts" in aux:
        scores["experts"] = aux["experts"]
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


def answer_logps(decoder: Decoder, rows: Rows) -> dict[str, Float[Array, "B P"]]:
    """Summed log-probabilities of the two answers of each pair: `chosen_logps` and `rejected_logps`, 0 for no pair.

    Under the reference model these are what a preference job stores beside its rows.
    """
    scores, mask = score_rows(decoder, rows, ("logps",))
    chosen, rejected = sum_by_answer(scores["logps"], mask, rows)
    return {"chosen_logps": chosen, "rejected_logps": rejected}
