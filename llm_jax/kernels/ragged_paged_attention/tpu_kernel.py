"""One tile of queries a step; the pages of its keys come by asynchronous copies, a block ahead of the arithmetic.

All key heads of a page are one copy. Two buffers: while a block is worked on, the next one, which may be the first of
the next tile, is on its way. A tile's loop goes from the first to the last block that any of its tokens sees. A tile
with one token (a decoding request within a mixed batch) works on its first rows alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels.ragged_paged_attention.pages import Pages
from llm_jax.kernels.ragged_paged_attention.spec import RaggedSpec
from llm_jax.kernels.ragged_paged_attention.work import Tiles

LANES = 128
UNROLLED_HEADS = 8


class _Scalars(NamedTuple):
    """In scalar memory."""

    request: Any
    count: Any
    position: Any
    first: Any
    end: Any
    active: Any
    """[1]: tiles that have tokens."""
    tables: Any
    """[R · M]."""


class _Buffers(NamedTuple):
    """In vector memory, two of each: keys, values and scales of a block, those that there are."""

    k: Any
    v: Any
    k_scales: Any
    v_scales: Any


def attention(
    spec: RaggedSpec,
    block: int,
    work: Tiles,
    page_tables: Int[Array, "R M"],
    q: Float[Array, "I K r H"],
    pages: Pages,
    scales: list[Float[Array, "R J K s"] | None],
    slopes: Float[Array, "K r"] | None,
    sinks: Float[Array, "K r"] | None,
) -> tuple[Float[Array, "I K r Hv"], Float[Array, "I K r"] | None]:
    """Output by tile, and the log-sum-exp where the call asks for it."""
    tiles, K, rows, H = q.shape
    unit = 32 // q.dtype.itemsize
    padded = -(-rows // unit) * unit
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    scalars = _Scalars(
        work.request,
        work.count,
        work.position,
        work.first,
        work.end,
        jnp.sum(work.count > 0, dtype=jnp.int32)[None],
        page_tables.reshape(-1),
    )
    of_tile = lambda *sizes: pl.BlockSpec((1, K, padded, *sizes), lambda i, *_: (i, 0, 0, 0))  # noqa: E731
    of_row = pl.BlockSpec((K, padded, 1), lambda i, *_: (0, 0, 0))
    per_row = [None if x is None else jnp.pad(x, ((0, 0), (0, padded - rows)))[..., None] for x in (slopes, sinks)]
    stored = _Buffers(pages.k, pages.v, *scales)
    inputs = (q, *per_row, *stored)
    in_specs = (
        of_tile(H),
        *(None if x is None else of_row for x in per_row),
        *(None if x is None else pl.BlockSpec(memory_space=pl.ANY) for x in stored),
    )
    buffers = _Buffers(
        pltpu.VMEM((2, K, block, H), pages.k.dtype),
        None if pages.v is None else pltpu.VMEM((2, K, block, spec.widths[1]), pages.v.dtype),
        *(None if x is None else pltpu.VMEM((2, K, block), jnp.float32) for x in scales),
    )
    # Values are worked on in whole lanes, whatever follows them: other numbers of a latent key, or zeros.
    width = -(-spec.value_dim // LANES) * LANES
    outputs = [jax.ShapeDtypeStruct((tiles, K, padded, width), q.dtype)]
    if spec.lse:
        outputs.append(jax.ShapeDtypeStruct((tiles, K, padded, 1), jnp.float32))
    out, *lse = pl.pallas_call(
        functools.partial(_kernel, spec, block),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tiles,),
            in_specs=[x for x in in_specs if x is not None],
            out_specs=[of_tile(x.shape[-1]) for x in outputs],
            scratch_shapes=[
                *(x for x in buffers if x is not None),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((K, padded, 1), jnp.float32),
                pltpu.VMEM((K, padded, 1), jnp.float32),
                pltpu.VMEM((K, padded, width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="llm_jax_ragged_paged_attention",
    )(*scalars, *(x for x in inputs if x is not None))
    return out[:, :, :rows, : spec.value_dim], lse[0][:, :, :rows, 0] if lse else None


def _kernel(spec: RaggedSpec, block: int, *refs: Any) -> None:
    left = iter(refs)

    def take(there: bool = True) -> Any:
        return next(left) if there else None

    scalars = _Scalars(*(take() for _ in _Scalars._fields))
    both = spec.packed and not spec.latent
    q, slopes, sinks = take(), take(spec.alibi), take(spec.sinks)
    stored = _Buffers(take(), take(not spec.latent), take(spec.packed), take(both))
    out, lse = take(), take(spec.lse)
    buffers = _Buffers(take(), take(not spec.latent), take(spec.packed), take(both))
    semaphores, top, total, acc, turn = left
    K, padded = q.shape[1:3]
    tile, active = pl.program_id(0), scalars.active[0]
    copies = functools.partial(_copies, spec, block, scalars, stored, buffers, semaphores)

    @pl.when((tile == 0) & (active > 0))
    def _():
        turn[0] = 0
        copies(jnp.int32(0), scalars.first[0] // block, 0, start=True)

    def attend(rows: int) -> None:
        top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32) if sinks is None else sinks[...]
        total[...] = jnp.full(total.shape, 0.0 if sinks is None else 1.0, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        low, high = _blocks(block, scalars, tile)

        def one_block(j: Array, slot: Array) -> Array:
            last = j + 1 >= high
            next_tile = jnp.where(last, tile + 1, tile)

            @pl.when(next_tile < active)
            def _():
                first = _blocks(block, scalars, jnp.minimum(next_tile, scalars.first.shape[0] - 1))[0]
                copies(next_tile, jnp.where(last, first, j + 1), 1 - slot, start=True)

            copies(tile, j, slot, start=False)
            _hide(spec, block, scalars, buffers, tile, j, slot)

            def one_head(h: Any, _: None) -> None:
                state = top.at[h, :rows], total.at[h, :rows], acc.at[h, :rows]
                slope = None if slopes is None else slopes[h, :rows]
                _update(spec, block, scalars, buffers, tile, j, slot, h, q[0, h, :rows], slope, *state)

            lax.fori_loop(0, K, one_head, None, unroll=K <= UNROLLED_HEADS)
            return 1 - slot

        turn[0] = lax.fori_loop(low, high, one_block, turn[0])
        sums = total[...]
        out[0] = (acc[...] * jnp.where(sums > 0, 1.0 / sums, 0.0)).astype(out.dtype)
        if lse is not None:
            lse[0] = top[...] + jnp.log(sums)

    unit = 32 // q.dtype.itemsize
    few = -(-spec.group // unit) * unit
    one_token = scalars.count[tile] <= 1
    if padded < 2 * few:
        pl.when(tile < active)(lambda: attend(padded))
    else:
        pl.when((tile < active) & one_token)(lambda: attend(few))
        pl.when((tile < active) & ~one_token)(lambda: attend(padded))


def _blocks(block: int, scalars: _Scalars, tile: Array) -> tuple[Array, Array]:
    """First block of a tile, and one past its last. One at least, so that each tile has a first to bring ahead."""
    low = scalars.first[tile] // block
    return low, jnp.maximum(low + 1, pl.cdiv(scalars.end[tile], block))


def _copies(
    spec: RaggedSpec,
    block: int,
    scalars: _Scalars,
    stored: _Buffers,
    buffers: _Buffers,
    semaphores: Any,
    tile: Array,
    j: Array,
    slot: Any,
    *,
    start: bool,
) -> None:
    """Starts the copies of a block into buffer `slot`, or waits for them: of its pages that hold slots below `end`."""
    request, page = scalars.request[tile], spec.page_size
    ahead = j * (block // page)
    semaphore = semaphores.at[slot]

    def go(source: Any, target: Any) -> None:
        copy = pltpu.make_async_copy(source, target, semaphore)
        copy.start() if start else copy.wait()

    def one_page(p: Array, _: None) -> None:
        index = scalars.tables[request * spec.table + ahead + p]
        place = pl.ds(pl.multiple_of(p * page, page), page)
        for source, target in ((stored.k, buffers.k), (stored.v, buffers.v)):
            if source is not None:
                go(source.at[index], target.at[slot, :, place, :])

    lax.fori_loop(0, jnp.clip(pl.cdiv(scalars.end[tile], page) - ahead, 0, block // page), one_page, None)
    for source, target in ((stored.k_scales, buffers.k_scales), (stored.v_scales, buffers.v_scales)):
        if source is not None:
            go(source.at[request, j], target.at[slot])


def _hide(
    spec: RaggedSpec, block: int, scalars: _Scalars, buffers: _Buffers, tile: Array, j: Array, slot: Array
) -> None:
    """Zeros in the values of slots that no token of the tile sees: what is there may be NaN, and 0 · NaN is no 0."""
    values = buffers.k if buffers.v is None else buffers.v
    first, end = scalars.first[tile] - j * block, scalars.end[tile] - j * block

    @pl.when((first > 0) | (end < block))
    def _():
        def one_head(h: Any, _: None) -> None:
            kept = values[slot, h]
            place = lax.broadcasted_iota(jnp.int32, kept.shape, 0)
            seen = (place >= first) & (place < end)
            values[slot, h] = jnp.where(seen, kept.astype(jnp.float32), 0.0).astype(kept.dtype)

        lax.fori_loop(0, spec.kv_heads, one_head, None)


def _update(
    spec: RaggedSpec,
    block: int,
    scalars: _Scalars,
    buffers: _Buffers,
    tile: Array,
    j: Array,
    slot: Array,
    h: Any,
    q: Float[Array, "r H"],
    slope: Float[Array, "r 1"] | None,
    top: Any,
    total: Any,
    acc: Any,
) -> None:
    """One step of the online softmax for one key head."""
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT

    def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
        dims = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    def numbers(ref: Any) -> Array:
        kept = ref[slot, h]
        return kept.astype(jnp.float32).astype(q.dtype) if spec.packed else kept

    k = numbers(buffers.k)
    v = (k if buffers.v is None else numbers(buffers.v))[:, : acc.shape[1]]
    scores = dot(q, k, (1, 1)) * spec.scale
    if buffers.k_scales is not None:
        scores *= buffers.k_scales[slot, pl.ds(h, 1)]
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    place = lax.broadcasted_iota(jnp.int32, scores.shape, 1) + j * block
    position = scalars.position[tile] + lax.broadcasted_iota(jnp.int32, scores.shape, 0) // spec.group
    if slope is not None:
        scores -= slope * (position - place).astype(jnp.float32)
    seen = place <= position
    if spec.window is not None:
        seen &= place > position - spec.window
    scores = jnp.where(seen, scores, -jnp.inf)
    old_top = top[...]
    new_top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
    # A row that has seen no key yet keeps -inf; exp(-inf - 0) is the 0 that it needs.
    finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    probs = jnp.exp(scores - finite_top)
    shrink = jnp.exp(old_top - finite_top)
    top[...] = new_top
    total[...] = total[...] * shrink + jnp.sum(probs, axis=1, keepdims=True)
    if buffers.k_scales is not None:
        scales = buffers.k_scales if buffers.v_scales is None else buffers.v_scales
        probs = jnp.where(seen, probs * scales[slot, pl.ds(h, 1)], 0.0)
    acc[...] = acc[...] * shrink + dot(probs.astype(v.dtype), v, (1, 0))
