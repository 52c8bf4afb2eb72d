"""Sizes of the tiles, and which blocks of keys a block of queries may see."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, first_position

BLOCK = {"cpu": 256, "gpu": 512, "tpu": 512}
"""Queries and keys of a tile."""
TILE_BYTES = {"cpu": 16 * 2**20, "gpu": 256 * 2**20, "tpu": 256 * 2**20}
"""What the scores of one tile may take. On a CPU a compromise: small enough for its caches, and large enough that
sharing a pass over it between cores costs less than the pass (measured: 1 MiB takes 1.3 times as long)."""
FAR = 2**30
"""Beyond every position and segment id."""


@dataclass(frozen=True)
class Tiling:
    """`groups` x `rows` rows of the batch; blocks of equal size, the last one padded."""

    groups: int
    rows: int
    q_blocks: int
    q_block: int
    kv_blocks: int
    kv_block: int

    @property
    def q_padded(self) -> int:
        return self.q_blocks * self.q_block

    @property
    def kv_padded(self) -> int:
        return self.kv_blocks * self.kv_block


def tiling(spec: AttentionSpec, platform: str) -> Tiling:
    """Tile sizes for this call on this kind of device."""
    block = BLOCK.get(platform, 512)
    q_blocks, q_block = _blocks(spec.q_len, block)
    # Few queries (decoding) leave room for more keys.
    kv_blocks, kv_block = _blocks(spec.kv_len, min(max(block, block * block // q_block), 4 * block))
    row_bytes = 4 * spec.heads * q_block * kv_block
    wanted = max(1, TILE_BYTES.get(platform, 256 * 2**20) // row_bytes)
    rows = max(n for n in range(1, min(wanted, spec.batch) + 1) if spec.batch % n == 0)
    return Tiling(spec.batch // rows, rows, q_blocks, q_block, kv_blocks, kv_block)


def _blocks(length: int, block: int) -> tuple[int, int]:
    """Number and size of the blocks; equal sizes, a multiple of 8 where there are several, waste little."""
    count = math.ceil(length / block)
    if count == 1:
        return 1, length
    size = math.ceil(length / count / 8) * 8
    return math.ceil(length / size), size


def pad_masks(spec: AttentionSpec, tiles: Tiling, masks: MaskArrays) -> MaskArrays:
    """Mask arrays in whole blocks. Padding is segment 0, and repeats the last position and range."""
    q_extra, kv_extra = tiles.q_padded - spec.q_len, tiles.kv_padded - spec.kv_len

    def zeros(x: Array | None, extra: int) -> Array | None:
        return None if x is None else jnp.pad(x, ((0, 0), (0, extra)))

    def edge(x: Array | None, extra: int) -> Array | None:
        return None if x is None else jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)), mode="edge")

    return MaskArrays(
        zeros(masks.q_segments, q_extra),
        zeros(masks.kv_segments, kv_extra),
        edge(masks.q_positions, q_extra),
        edge(masks.kv_positions, kv_extra),
        edge(masks.kv_ranges, q_extra),
    )


def block_bounds(
    spec: AttentionSpec, tiles: Tiling, masks: MaskArrays
) -> tuple[Int[Array, "groups q_blocks"], Int[Array, "groups q_blocks"]]:
    """First block of keys that some query of the block may see, and one past the last; equal where there is none.

    Judged by the smallest and largest position, segment and range of each block, so a block within the bounds may
    still turn out to hold nothing visible; one outside of them never does.
    """
    return span(_Extents.of(spec, tiles, masks).may_see(), axis=-1)


def section_bounds(spec: AttentionSpec, tiles: Tiling, masks: MaskArrays, *, of: str) -> Int[Array, "groups blocks 4"]:
    """(low, full_low, full_high, high): [low, high) as `block_bounds`; in [full_low, full_high) everybody sees all.

    Args:
        of: "queries": blocks of keys for each block of queries; "keys": the other way round. There, keys past the
            last one count as visible: their gradients are computed and dropped.
    """
    extents = _Extents.of(spec, tiles, masks)
    shape = (tiles.groups, tiles.q_blocks, tiles.kv_blocks)
    full = jnp.broadcast_to(extents.all_see(real_keys=of == "queries"), shape)
    may_see = extents.may_see()
    if of == "keys":
        full, may_see = full.mT, may_see.mT
    low, high = span(may_see, axis=-1)
    index = jnp.arange(full.shape[-1])
    full_low = jnp.where(full, index, FAR).min(-1)
    full_high = jnp.where(full | (index < full_low[..., None]), full.shape[-1], index).min(-1)
    none = full_low == FAR
    # Where nothing is full, all is masked: after it for queries, as under a causal mask, and before it for keys.
    instead = low if of == "queries" else high
    bounds = (low, jnp.where(none, instead, full_low), jnp.where(none, instead, full_high), high)
    return jnp.stack([x.astype(jnp.int32) for x in bounds], -1)


def may_take_part(
    spec: AttentionSpec, masks: MaskArrays
) -> tuple[Bool[Array, "B T"] | None, Bool[Array, "B S"] | None]:
    """Queries that may see a key, and keys that a query may see; None where all do.

    Judged by extents as `block_bounds`: what is False takes no part for sure (padding, slots past a length).
    """
    data = spec.segments or spec.positions or spec.ranges
    restricted = spec.causal or spec.window is not None or spec.chunk is not None
    if not data and not (restricted and spec.q_len != spec.kv_len):
        return None, None
    B, T, S = spec.batch, spec.q_len, spec.kv_len
    queries = _Extents.of(spec, Tiling(B, 1, T, 1, 1, S), masks).may_see()[:, :, 0]
    keys = _Extents.of(spec, Tiling(B, 1, 1, T, S, 1), masks).may_see()[:, 0]
    return queries, keys


def span(visited: Bool[Array, "..."], axis: int) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """First true index along an axis and one past the last; equal where there is none."""
    visited = jnp.moveaxis(visited, axis, -1)
    size = visited.shape[-1]
    index = jnp.arange(size)
    low = jnp.where(visited, index, size).min(-1)
    high = jnp.where(visited, index + 1, 0).max(-1)
    return jnp.minimum(low, high).astype(jnp.int32), high.astype(jnp.int32)


class _Span(NamedTuple):
    """Smallest and largest value of each block; arrays that broadcast over [batch, q_blocks, kv_blocks]."""

    low: Array
    high: Array


@dataclass(frozen=True)
class _Extents:
    """What is known of each block of queries and of keys: the extents of what the mask depends on."""

    spec: AttentionSpec
    tiles: Tiling
    q_positions: _Span
    kv_positions: _Span
    segments: tuple[Array, Array] | None
    """Of queries and keys, [batch, blocks, size]."""
    starts: _Span | None
    ends: _Span | None

    @classmethod
    def of(cls, spec: AttentionSpec, tiles: Tiling, masks: MaskArrays) -> "_Extents":
        masks = pad_masks(spec, tiles, masks)
        q_positions, kv_positions = masks.q_positions, masks.kv_positions
        if q_positions is None:
            q_positions = jnp.minimum(jnp.arange(tiles.q_padded), spec.q_len - 1)[None] + first_position(spec)
        if kv_positions is None:
            kv_positions = jnp.minimum(jnp.arange(tiles.kv_padded), spec.kv_len - 1)[None]

        def blocks(x: Array, count: int) -> Array:
            return x.reshape(x.shape[0], count, -1)

        def of_queries(x: Array) -> _Span:
            x = blocks(x, tiles.q_blocks)
            return _Span(x.min(-1)[:, :, None], x.max(-1)[:, :, None])

        def of_keys(x: Array) -> _Span:
            x = blocks(x, tiles.kv_blocks)
            return _Span(x.min(-1)[:, None], x.max(-1)[:, None])

        segments = None
        if masks.q_segments is not None and masks.kv_segments is not None:
            segments = blocks(masks.q_segments, tiles.q_blocks), blocks(masks.kv_segments, tiles.kv_blocks)
        ranges = masks.kv_ranges
        return cls(
            spec,
            tiles,
            of_queries(q_positions),
            of_keys(kv_positions),
            segments,
            None if ranges is None else of_queries(ranges[..., 0]),
            None if ranges is None else of_queries(ranges[..., 1]),
        )

    def may_see(self) -> Bool[Array, "groups q_blocks kv_blocks"]:
        """Whether some query may see some key; a group of rows of the batch is one."""
        spec, tiles, q, kv = self.spec, self.tiles, self.q_positions, self.kv_positions
        may_see = jnp.ones((1, tiles.q_blocks, tiles.kv_blocks), bool)
        if spec.causal:
            may_see &= kv.low <= q.high
        if spec.window is not None:
            may_see &= kv.high > q.low - spec.window
            if not spec.causal:
                may_see &= kv.low < q.high + spec.window
        if spec.chunk is not None:
            may_see &= (q.low // spec.chunk <= kv.high // spec.chunk) & (kv.low // spec.chunk <= q.high // spec.chunk)
        if self.segments is not None:
            q_low, kv_low = (jnp.where(x == 0, FAR, x).min(-1) for x in self.segments)
            q_high, kv_high = (jnp.where(x == 0, -FAR, x).max(-1) for x in self.segments)
            may_see &= (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
        if self.starts is not None and self.ends is not None:
            first = jnp.arange(tiles.kv_blocks) * tiles.kv_block
            may_see &= (self.starts.low < first + tiles.kv_block) & (self.ends.high > first)
            may_see &= self.starts.low < self.ends.high
        may_see = jnp.broadcast_to(may_see, (spec.batch, tiles.q_blocks, tiles.kv_blocks))
        return may_see.reshape(tiles.groups, tiles.rows, tiles.q_blocks, tiles.kv_blocks).any(1)

    def all_see(self, *, real_keys: bool) -> Bool[Array, "B q_blocks kv_blocks"]:
        """Whether every query sees every key; with `real_keys`, none of which is padding. For rows == 1."""
        spec, tiles, q, kv = self.spec, self.tiles, self.q_positions, self.kv_positions
        first = jnp.arange(tiles.kv_blocks) * tiles.kv_block
        all_see = jnp.broadcast_to(
            (first + tiles.kv_block <= spec.kv_len) | (not real_keys), (1, tiles.q_blocks, tiles.kv_blocks)
        )
        if spec.causal:
            all_see &= kv.high <= q.low
        if spec.window is not None:
            all_see &= kv.low > q.high - spec.window
            if not spec.causal:
                all_see &= kv.high < q.low + spec.window
        if spec.chunk is not None:
            same = (q.low // spec.chunk == kv.high // spec.chunk) & (kv.low // spec.chunk == q.high // spec.chunk)
            all_see &= same
        if self.segments is not None:
            (q_low, kv_low), (q_high, kv_high) = (
                [x.min(-1) for x in self.segments],
                [x.max(-1) for x in self.segments],
            )
            all_see &= (q_low == q_high)[:, :, None] & (q_low[:, :, None] == kv_low[:, None])
            all_see &= (kv_low == kv_high)[:, None] & (kv_low != 0)[:, None]
        if self.starts is not None and self.ends is not None:
            all_see &= (self.starts.high <= first) & (self.ends.low >= first + tiles.kv_block)
        return all_see
