"""The work cut into tiles: some tokens of one request each, against a range of that request's keys."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels.ragged_paged_attention.spec import Batch, RaggedSpec


class Tiles(NamedTuple):
    """One entry per tile, those with tokens first. A tile without has `count` 0 and no keys."""

    request: Int[Array, " I"]
    start: Int[Array, " I"]
    """The tile's first token among all."""
    count: Int[Array, " I"]
    position: Int[Array, " I"]
    """Of the first token in its request."""
    first: Int[Array, " I"]
    """First slot that any of the tokens sees."""
    end: Int[Array, " I"]
    """One past the last slot that any of them sees."""


def tile_tokens(spec: RaggedSpec, most: int) -> int:
    """Tokens per tile: 1 where requests have one each, else a power of two up to `most`.

    Four times the mean of a request, as a batch that mixes decoding and prefill has most of its tokens in few requests.
    """
    if spec.tokens <= spec.requests:
        return 1
    return min(most, 1 << (4 * spec.tokens // spec.requests - 1).bit_length())


def num_tiles(spec: RaggedSpec, size: int) -> int:
    """Tiles that suffice for whatever batch: each request with tokens ends in one that may be part full."""
    return (spec.tokens + min(spec.requests, spec.tokens) * (size - 1)) // size


def tiles_of(spec: RaggedSpec, batch: Batch, size: int) -> Tiles:
    """The tiles of a batch within bounds, `size` tokens each, in the order of the tokens."""
    cu_q_lens, ends, begins = _extents(batch, size)
    index = jnp.arange(num_tiles(spec, size), dtype=jnp.int32)
    request = jnp.minimum(_group_of(ends, index), spec.requests - 1)
    offset = (index - begins[request]) * size
    start, stop = cu_q_lens[request] + offset, cu_q_lens[request + 1]
    count = jnp.where(index < ends[-1], jnp.clip(stop - start, 0, size), 0)
    position = batch.kv_lens[request] - (stop - cu_q_lens[request]) + offset
    end = jnp.where(count > 0, jnp.clip(position + count, 0, batch.kv_lens[request]), 0)
    first = jnp.zeros_like(end) if spec.window is None else jnp.clip(position - spec.window + 1, 0, end)
    return Tiles(request, start, count, position, first, end)


def pack(spec: RaggedSpec, tiles: Tiles, q: Float[Array, "T N H"], size: int) -> Float[Array, "I K r H"]:
    """Queries by tile; heads that share a key are further rows, t · G + g. Rows past `count` are other requests'."""
    if size > 1:
        q = q[jnp.minimum(tiles.start[:, None] + jnp.arange(size), spec.tokens - 1)]
    q = q.reshape(-1, size, spec.kv_heads, spec.group, spec.head_dim)
    return jnp.moveaxis(q, 1, 2).reshape(-1, spec.kv_heads, size * spec.group, spec.head_dim)


def unpack(
    spec: RaggedSpec, batch: Batch, x: Float[Array, "I K r *H"], size: int, empty: float = 0.0
) -> Float[Array, "T N *H"]:
    """Rows of tiles back to their tokens and heads; a token of no request gets `empty`."""
    tail = x.shape[3:]
    x = jnp.moveaxis(x.reshape(-1, spec.kv_heads, size, spec.group, *tail), 2, 1)
    x = x.reshape(-1, size, spec.heads, *tail)
    token = jnp.arange(spec.tokens, dtype=jnp.int32)
    if size > 1:
        cu_q_lens, _, begins = _extents(batch, size)
        request = jnp.minimum(_group_of(cu_q_lens[1:], token), spec.requests - 1)
        offset = token - cu_q_lens[request]
        x = x[jnp.minimum(begins[request] + offset // size, x.shape[0] - 1), offset % size]
    else:
        x = x[:, 0]
    real = (token < batch.cu_q_lens[-1]).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(real, x, empty)


def per_row(spec: RaggedSpec, x: Float[Array, " N"] | None, size: int) -> Float[Array, "K r"] | None:
    """A number of each query head, for the rows of a tile."""
    if x is None:
        return None
    x = x.astype(jnp.float32).reshape(spec.kv_heads, 1, spec.group)
    return jnp.broadcast_to(x, (spec.kv_heads, size, spec.group)).reshape(spec.kv_heads, -1)


def _group_of(ends: Int[Array, " R"], index: Int[Array, " n"]) -> Int[Array, " n"]:
    """How many groups end at or before each index: the group it is in. All compared at once: few, and no loop."""
    return jnp.sum(ends <= index[:, None], axis=1, dtype=jnp.int32)


def _extents(batch: Batch, size: int) -> tuple[Array, Array, Array]:
    """cu_q_lens, and of each request one past its last tile, and its first tile."""
    counts = -(-jnp.diff(batch.cu_q_lens) // size)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    return batch.cu_q_lens, ends, ends - counts
