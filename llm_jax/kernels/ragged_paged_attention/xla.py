"""By plain XLA: a loop over blocks of keys, each brought together from its pages, that ends with the request.

Tiles (`work`) go through in groups whose block of keys stays in a CPU's cache, where it is written once and read once.
Other backends take all tiles at once. Decoding on a CPU may leave the pages in their places (`xla_in_place`).
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.platform import target_platform
from llm_jax.kernels.ragged_paged_attention import xla_in_place
from llm_jax.kernels.ragged_paged_attention.pages import Pages
from llm_jax.kernels.ragged_paged_attention.spec import Batch, Extras, RaggedSpec
from llm_jax.kernels.ragged_paged_attention.work import Tiles, num_tiles, pack, per_row, tile_tokens, tiles_of, unpack

BLOCK = 128
"""Slots per block of keys, or one page where that has more."""
TOKENS = 32
"""The most tokens of a tile."""
GROUP_BYTES = {"cpu": 256 * 1024}
"""The most that a group's block of keys and values takes, in float32, on backends where that matters."""


def supports(spec: RaggedSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def attention(
    spec: RaggedSpec, q: Float[Array, "T N H"], pages: Pages, batch: Batch, extras: Extras
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """Output in q's dtype and float32 log-sum-exp, by online softmax."""
    size = tile_tokens(spec, TOKENS)
    tiles = tiles_of(spec, batch, size)
    tables = batch.page_tables[tiles.request]
    slopes, sinks = (per_row(spec, x, size) for x in extras)
    work = (pack(spec, tiles, q, size), tiles, tables, pages, slopes, sinks)

    by_blocks = functools.partial(_attend_in_groups, spec, size)
    if xla_in_place.supports(spec, size):
        entry, in_place = xla_in_place.entries(spec, tiles, tables)
        out, lse = lax.cond(in_place, functools.partial(xla_in_place.attend, spec, entry), by_blocks, *work)
    else:
        out, lse = by_blocks(*work)
    return unpack(spec, batch, out, size), unpack(spec, batch, lse, size, empty=-jnp.inf)


def _attend_in_groups(
    spec: RaggedSpec,
    size: int,
    q: Float[Array, "I K r H"],
    tiles: Tiles,
    tables: Int[Array, "I M"],
    pages: Pages,
    slopes: Float[Array, "K r"] | None,
    sinks: Float[Array, "K r"] | None,
) -> tuple[Float[Array, "I K r Hv"], Float[Array, "I K r"]]:
    pages_per_block = max(1, BLOCK // spec.page_size)
    group = _tiles_per_group(spec, size, pages_per_block * spec.page_size)
    tables = jnp.pad(tables, ((0, 0), (0, -spec.table % pages_per_block)))
    count, padding = q.shape[0], -q.shape[0] % group
    if count == group:
        return _attend(spec, q, tiles, tables, pages, slopes, sinks, pages_per_block)

    def grouped(x: Array) -> Array:
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, group, *x.shape[1:])

    def one_group(work: tuple[Array, Tiles, Array]) -> tuple[Array, Array]:
        return _attend(spec, *work, pages, slopes, sinks, pages_per_block)

    out, lse = lax.map(one_group, (grouped(q), Tiles(*map(grouped, tiles)), grouped(tables)))
    return out.reshape(-1, *out.shape[2:])[:count], lse.reshape(-1, *lse.shape[2:])[:count]


def _tiles_per_group(spec: RaggedSpec, size: int, block: int) -> int:
    count = num_tiles(spec, size)
    budget = GROUP_BYTES.get(target_platform())
    if budget is None:
        return count
    one = 4 * block * spec.kv_heads * (spec.head_dim + spec.value_dim)
    return max(1, min(count, budget // one))


def _attend(
    spec: RaggedSpec,
    q: Float[Array, "i K r H"],
    tiles: Tiles,
    tables: Int[Array, "i M"],
    pages: Pages,
    slopes: Float[Array, "K r"] | None,
    sinks: Float[Array, "K r"] | None,
    pages_per_block: int,
) -> tuple[Float[Array, "i K r Hv"], Float[Array, "i K r"]]:
    block = pages_per_block * spec.page_size
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    first, end = tiles.first[:, None], tiles.end[:, None]
    position = (tiles.position[:, None] + jnp.arange(q.shape[2]) // spec.group)[:, None, :, None]

    def dot(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)

    def body(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = state
        ids = lax.dynamic_slice_in_dim(tables, j * pages_per_block, pages_per_block, axis=1)

        def of_block(x: Array) -> Array:
            x = jnp.moveaxis(x.at[ids].get(mode="promise_in_bounds"), 2, 1)
            return x.reshape(*x.shape[:2], block, *x.shape[4:])

        slot = j * block + jnp.arange(block)
        inside = ((slot >= first) & (slot < end))[:, None]
        k = of_block(pages.k)[..., : spec.head_dim].astype(q.dtype)
        v = (k if pages.v is None else of_block(pages.v).astype(q.dtype))[..., : spec.value_dim]
        v = jnp.where(inside[..., None], v, 0)
        scores = dot("ikrh,iksh->ikrs", q, k) * spec.scale
        if pages.k_scales is not None:
            k_scales = of_block(pages.k_scales)[:, :, None]
            scores *= k_scales
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        slot = slot[None, None, None]
        if slopes is not None:
            scores -= slopes[:, :, None] * (position - slot)
        seen = slot <= position
        if spec.window is not None:
            seen &= slot > position - spec.window
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        # A row that has seen no key yet keeps -inf; exp(-inf - 0) is the 0 that it needs.
        finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        probs = jnp.exp(scores - finite_top[..., None])
        shrink = jnp.exp(top - finite_top)
        total = total * shrink + probs.sum(-1)
        if pages.k_scales is not None:
            scales = k_scales if pages.v_scales is None else of_block(pages.v_scales)[:, :, None]
            probs = jnp.where(inside[:, :, None], probs * scales, 0.0)
        out = out * shrink[..., None] + dot("ikrs,iksh->ikrh", probs.astype(v.dtype), v)
        return new_top, total, out

    if sinks is None:
        state = manual_axes.full(q.shape[:3], -jnp.inf, (q, pages)), manual_axes.full(q.shape[:3], 0.0, (q, pages))
    else:
        zero = manual_axes.full(q.shape[:3], 0.0, (q, pages))
        state = zero + sinks, zero + 1.0
    state = (*state, manual_axes.full((*q.shape[:3], spec.value_dim), 0.0, (q, pages)))
    top, total, out = lax.fori_loop(jnp.min(tiles.first // block), jnp.max(-(-tiles.end // block)), body, state)
    out = out * jnp.where(total > 0, 1.0 / total, 0.0)[..., None]
    return out.astype(q.dtype), top + jnp.log(total)
