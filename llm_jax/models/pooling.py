"""One vector for each document of a row."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax.base.errors import UserError


def pool(
    hidden: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"] | None,
    documents: int,
    how: Literal["last", "first", "mean"],
) -> tuple[Float[Array, "B documents D"], Bool[Array, "B documents"]]:
    """Of the documents 1, …, `documents` of each row (None: the row is one), and which of them are there.

    Those beyond `documents` are left out; raises UserError where it is less than 1.

    The last or first token is taken as it is, in whatever dtype; a mean is made in float32. A document that is not
    there gives zeros. Written as a product with weights of the tokens, which shards along rows and tokens alike.
    """
    if documents < 1:
        raise UserError(f"documents={documents}: scores are of at least one document of each row")
    B, T = hidden.shape[:2]
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    inside = ids[:, None] == jnp.arange(1, documents + 1, dtype=jnp.int32)[:, None]
    if how == "mean":
        weights, kind = inside / jnp.maximum(inside.sum(-1, keepdims=True), 1), jnp.float32
    else:
        at = jnp.arange(T)
        chosen = jnp.where(inside, at, -1).max(-1) if how == "last" else jnp.where(inside, at, T).min(-1)
        weights, kind = inside & (at == chosen[..., None]), hidden.dtype
    weights, highest = weights.astype(kind), jax.lax.Precision.HIGHEST
    pooled = jnp.einsum("bnt,btd->bnd", weights, hidden.astype(kind), precision=highest)
    return pooled.astype(hidden.dtype), inside.any(-1)
