"""Prefix language models: what comes first is read from both sides, what follows is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llm_jax.base.errors import UserError
from llm_jax.models.cache import Cache, Empty


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


def with_sight(caches: Sequence[Cache], ends: Int[Array, "B T"]) -> list[Cache]:
    """The caches of a first call whose tokens see up to `ends` (see `sight_ends`).

    What a cache keeps of a token was made of all that the token saw. So a prefix comes whole in one call, before which
    nothing is kept: raises UserError for a cache that is not known to be empty (`cache.known_empty`).
    """
    seeing: list[Any] = []
    for cache in caches:
        if cache is not None and not isinstance(cache, Empty):
            raise UserError(
                "a prefix has to come whole in the first call over caches (prefill): what is kept of tokens before it "
                "would have to be made anew"
            )
        seeing.append(None if cache is None else replace(cache, ends=ends))
    return seeing
