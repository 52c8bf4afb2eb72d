"""Decoding with the pages where they lie: every page against the query of the request that has it.

A CPU's matrix products are as fast as memory, and bringing pages together first doubles the traffic. Where requests
share no page and most pages are in use, all pages are multiplied in the order of memory, whoever has them; each gives
a partial result, and the page tables say which of them make up a token's (as in FlashDecoding, whose splits of the
keys are pages here).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels.platform import target_platform
from llm_jax.kernels.ragged_paged_attention.pages import Pages
from llm_jax.kernels.ragged_paged_attention.spec import RaggedSpec
from llm_jax.kernels.ragged_paged_attention.work import Tiles

IN_USE = 0.6
"""Share of the pages from which on reading all of them is faster than bringing together those in use."""


def supports(spec: RaggedSpec, tile_tokens: int) -> bool:
    """On CPUs, tiles of one token that see all that is before it, numbers that need no unpacking."""
    return target_platform() == "cpu" and tile_tokens == 1 and spec.window is None and not spec.packed


def entries(spec: RaggedSpec, tiles: Tiles, tables: Int[Array, "I M"]) -> tuple[Int[Array, " P"], Bool[Array, ""]]:
    """Where each page stands in the tables (i · M + m; -1: nowhere), and whether to go by that: no two tiles have the
    same page, and most pages are in use."""
    used = _used(spec, tiles)
    entry = jnp.arange(tables.size, dtype=jnp.int32).reshape(tables.shape)
    found = jnp.full(spec.pages, -1, jnp.int32).at[jnp.where(used, tables, spec.pages)].set(entry, mode="drop")
    alone = jnp.all((found[tables] == entry) | ~used)
    return found, alone & (jnp.sum(used) >= IN_USE * spec.pages)


def attend(
    spec: RaggedSpec,
    entry: Int[Array, " P"],
    q: Float[Array, "I K G H"],
    tiles: Tiles,
    tables: Int[Array, "I M"],
    pages: Pages,
    slopes: Float[Array, "K G"] | None,
    sinks: Float[Array, "K G"] | None,
) -> tuple[Float[Array, "I K G Hv"], Float[Array, "I K G"]]:
    """Output in q's dtype and log-sum-exp of each tile."""
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT

    def dot(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)

    owner = jnp.maximum(entry, 0) // spec.table
    order = jnp.where(entry < 0, spec.table, entry % spec.table)  # a page that nobody has is past all ends
    slot = (order[:, None] * spec.page_size + jnp.arange(spec.page_size))[:, None, None]

    # Slots wider than a head hold zeros there: the query's are cheaper than a copy of the pages without.
    q_wide = jnp.pad(q, ((0, 0),) * 3 + ((0, spec.widths[0] - spec.head_dim),))
    scores = dot("pkgh,pksh->pkgs", q_wide[owner], pages.k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    if slopes is not None:
        scores -= slopes[..., None] * (tiles.position[owner][:, None, None, None] - slot)
    scores = jnp.where(slot < tiles.end[owner][:, None, None, None], scores, -jnp.inf)
    page_top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(page_top == -jnp.inf, 0.0, page_top)[..., None])
    values = pages.k if pages.v is None else pages.v
    page_out = dot("pkgs,pksh->pkgh", weights.astype(values.dtype), values)

    # The last page of a tile may have slots that nobody has written, and 0 · NaN is no 0: its part is done again.
    last = jnp.maximum(tiles.end - 1, 0) // spec.page_size
    last_page = tables[jnp.arange(last.size), last]
    written = last[:, None] * spec.page_size + jnp.arange(spec.page_size) < tiles.end[:, None]
    last_values = jnp.where(written[:, None, :, None], values[last_page], 0)
    last_out = dot("ikgs,iksh->ikgh", weights[last_page].astype(values.dtype), last_values)

    used = _used(spec, tiles)[..., None, None]
    tops = jnp.where(used, page_top[tables], -jnp.inf)
    top = jnp.max(tops, axis=1)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    finite_top = jnp.where(top == -jnp.inf, 0.0, top)
    shares = jnp.exp(tops - finite_top[:, None])
    total = jnp.sum(shares * jnp.sum(weights, axis=-1)[tables], axis=1)
    if sinks is not None:
        total += jnp.exp(sinks - finite_top)

    def add_page(m: Array, out: Array) -> Array:
        ids, share = (lax.dynamic_index_in_dim(x, m, axis=1, keepdims=False) for x in (tables, shares))
        part = page_out.at[ids].get(mode="promise_in_bounds") * share[..., None]
        return out + jnp.where((m < last)[:, None, None, None], part, 0.0)

    # One page of each tile at a time: as one sum over all of them XLA reads across the pages, number by number.
    share_of_last = jnp.take_along_axis(shares, last[:, None, None, None], axis=1)[:, 0]
    out = lax.fori_loop(0, jnp.max(last), add_page, last_out * share_of_last[..., None])
    out = out[..., : spec.value_dim] * jnp.where(total > 0, 1.0 / total, 0.0)[..., None]
    return out.astype(q.dtype), top + jnp.log(total)


def _used(spec: RaggedSpec, tiles: Tiles) -> Bool[Array, "I M"]:
    """Entries of the tiles' tables that count."""
    return jnp.arange(spec.table) * spec.page_size < tiles.end[:, None]
