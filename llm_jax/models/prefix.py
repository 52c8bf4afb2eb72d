"""Prefix language models: what comes first is read from both sides, what follows is generated."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def sight_ends(prefix: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """One past the last place in the row that each token sees.

    The tokens up to a document's last one with `prefix` see each other; those after it see what comes before them (Liu
    et al. 2018, arXiv:1801.10198; Raffel et al. 2020, arXiv:1910.10683, figure 3, "causal with prefix").
    `segment_ids` None: each row is one document.
    """
    B, T = prefix.shape
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    rows, own = jnp.arange(B)[:, None], jnp.arange(1, T + 1, dtype=jnp.int32)
    ends = jnp.zeros((B, T + 1), jnp.int32).at[rows, ids].max(jnp.where(prefix, own, 0))
    return jnp.maximum(own, ends[rows, ids])
