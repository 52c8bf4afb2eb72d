"""Sizes of the tiles, and which blocks of keys a block of queries may see."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, first_position
from llm_jax.kernels.platform import cores_per_device
from llm_jax.kernels.tiles import tiles

BLOCK = {"cpu": 256, "gpu": 512, "tpu": 512}
"""Queries and keys of a tile."""
SMALL_BLOCK = {"cpu": 128}
"""The same, where all rows of the batch together still fill `SHARED_BYTES`: less is computed of what nobody sees, the
more so the shorter the documents (answers of 130 tokens, one core: less than half the time)."""
SHARED_BYTES = 2 * 2**20
"""Scores of a tile below which sharing a pass between cores costs more than the pass."""
TILE_BYTES = {"cpu": 16 * 2**20, "gpu": 256 * 2**20, "tpu": 256 * 2**20}
"""What the scores of one tile may take. On a CPU a compromise: small enough for its caches, and large enough that
sharing a pass over it between cores costs less than the pass (measured: 1 MiB takes 1.3 times as long)."""
WHOLE = {"cpu": 1024}
"""Length of queries and keys up to which `xla_short.py` is faster: 0.35 to 0.9 of the time. A quarter of it where
documents are packed, as the loops skip what no document reaches."""
WHOLE_OF_A_CORE = 256
"""The same where a device is one core of a CPU and key heads are apart; where documents are packed, as before."""
WHOLE_BYTES = 4 * 2**20
"""What the scores of a tile of one row may take there, or of as many rows as fit. The tiles of one program do not share
their memory, and are slower where that does not stay in the caches."""
FINE = 8
"""Ranges of keys start and end at multiples of this."""
FAR = 2**30
"""Beyond every position and segment id."""


@dataclass(frozen=True)
class Tiles:
    """Sizes that may be tuned."""

    block: int
    """Queries and keys of a tile."""
    tile_mib: int
    """What its scores may take."""
    whole: int = 0
    """As `WHOLE`; 0: never."""
    apart: int = 0
    """1: each key head of each row has its own tiles, unless heads have slopes or sinks or queries are few."""


@dataclass(frozen=True)
class Tiling:
    """`groups` x `rows` rows of the batch; blocks of equal size, the last one padded."""

    groups: int
    rows: int
    q_blocks: int
    q_block: int
    kv_blocks: int
    kv_block: int
    whole: bool = False
    """A block of queries meets all of its keys at once."""
    apart: bool = False
    """Rows are those of `by_key_head`."""

    @property
    def q_padded(self) -> int:
        return self.q_blocks * self.q_block

    @property
    def kv_padded(self) -> int:
        return self.kv_blocks * self.kv_block

    def place(self, i: Array, j: Array) -> "Place":
        """Tile (i, j)."""
        return Place(i * self.q_block, self.q_block, j * self.kv_block, self.kv_block)


class Place(NamedTuple):
    """A rectangle of queries and keys: where each side starts, traced (a tile of a loop) or not, and its size."""

    q_start: Array | int
    q_size: int
    kv_start: Array | int
    kv_size: int

    @property
    def in_loop(self) -> bool:
        return not isinstance(self.kv_start, int)


def tiling(spec: AttentionSpec, platform: str) -> Tiling:
    """Tile sizes for this call on this kind of device."""
    chosen = tiles(
        "flash_attention", "xla", dtype=spec.dtype, shape=f"hd{spec.head_dim}", default=_default(spec, platform)
    )
    block = chosen.block
    q_blocks, q_block = _blocks(spec.q_len, block)
    # Few queries (decoding) leave room for more keys.
    kv_blocks, kv_block = _blocks(spec.kv_len, min(max(block, block * block // q_block), 4 * block))
    longest = chosen.whole // 4 if spec.segments else chosen.whole
    if max(spec.q_len, spec.kv_len) <= longest and not (spec.positions or spec.ranges):
        fitting = WHOLE_BYTES // (4 * spec.heads * q_block * spec.kv_len)
        # A single tile has no loops either way.
        if fitting and (q_blocks > 1 or kv_blocks > 1 or spec.batch > fitting):
            rows = _rows(spec, fitting)
            return Tiling(spec.batch // rows, rows, q_blocks, q_block, 1, spec.kv_len, whole=True)
    # Of few queries a head's tile would be too little for a pass.
    if chosen.apart and _can_be_apart(spec) and q_blocks > 1:
        return Tiling(spec.batch * spec.kv_heads, 1, q_blocks, q_block, kv_blocks, kv_block, apart=True)
    rows = _rows(spec, chosen.tile_mib * 2**20 // (4 * spec.heads * q_block * kv_block))
    return Tiling(spec.batch // rows, rows, q_blocks, q_block, kv_blocks, kv_block)


def by_key_head(spec: AttentionSpec) -> AttentionSpec:
    """The same attention with a row for each key head of each row."""
    return replace(spec, batch=spec.batch * spec.kv_heads, heads=spec.group, kv_heads=1)


def _can_be_apart(spec: AttentionSpec) -> bool:
    return not (spec.alibi or spec.sinks)


def _default(spec: AttentionSpec, platform: str) -> Tiles:
    whole = WHOLE.get(platform, 0)
    if platform == "cpu" and cores_per_device() == 1 and _can_be_apart(spec):
        return _default_of_a_core(spec, whole)
    return Tiles(_block(spec, platform), TILE_BYTES.get(platform, 256 * 2**20) // 2**20, whole)


def _default_of_a_core(spec: AttentionSpec, whole: int) -> Tiles:
    """Where nothing is shared between cores a pass costs what it computes, and the less the more a cache holds: the
    scores of one key head (of a single query head, 256 KiB). Blocks are small where documents may be."""
    data = spec.segments or spec.positions or spec.ranges
    large = not data and spec.group == 1 and min(spec.q_len, spec.kv_len) > 1024
    return Tiles(256 if large else 128, 2, whole if data else WHOLE_OF_A_CORE, apart=1)


def _rows(spec: AttentionSpec, wanted: int) -> int:
    """Rows of the batch at a time, which divide it: as many as are wanted, at most."""
    return max(n for n in range(1, min(max(1, wanted), spec.batch) + 1) if spec.batch % n == 0)


def _block(spec: AttentionSpec, platform: str) -> int:
    small = SMALL_BLOCK.get(platform)
    if small is not None and 4 * spec.batch * spec.heads * min(small, spec.q_len) * small >= SHARED_BYTES:
        return small
    return BLOCK.get(platform, 512)


def _blocks(length: int, block: int) -> tuple[int, int]:
    """Number and size of the blocks; equal sizes, a multiple of 8 where there are several, waste little."""
    count = math.ceil(length / block)
    if count == 1:
        return 1, length
    size = math.ceil(length / count / 8) * 8
    return math.ceil(length / size), size


def key_ranges(spec: AttentionSpec, tiles: Tiling) -> list[slice]:
    """For each block of queries the keys from the first to the last that one of them may see, as far as shapes tell;
    at least one. Where positions are data, shapes tell nothing (`tiling` sends no such call here)."""
    fine = replace(tiles, kv_blocks=math.ceil(spec.kv_len / FINE), kv_block=FINE)
    seen = [np.flatnonzero(row).tolist() for row in block_visibility(spec, fine, MaskArrays()).some[0]]
    return [slice(at[0] * FINE, min((at[-1] + 1) * FINE, spec.kv_len)) if at else slice(0, 1) for at in seen]


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


class BlockVisibility(NamedTuple):
    """Of each block of queries and block of keys; numpy where no mask array is involved, so that it is static."""

    some: Bool[Array, "B|1 q_blocks kv_blocks"]
    """Whether some query may see some key, judged by the smallest and largest position, segment and range of each
    block: where True there may still turn out to be nothing visible; where False there never is."""
    every: Bool[Array, "B|1 q_blocks kv_blocks"]
    """Whether every query sees every key; where False they may still turn out to."""


def block_visibility(spec: AttentionSpec, tiles: Tiling, masks: MaskArrays) -> BlockVisibility:
    """Which blocks of keys can be skipped, and which need no mask. Padding of the keys counts as not visible."""
    masks = pad_masks(spec, tiles, masks)
    nq, nk = tiles.q_blocks, tiles.kv_blocks
    xp: Any = np if all(x is None for x in masks) else jnp

    def per_block(x: Array, blocks: int) -> Array:
        return x.reshape(x.shape[0], blocks, -1)

    q_positions, kv_positions = masks.q_positions, masks.kv_positions
    if q_positions is None:
        q_positions = xp.minimum(xp.arange(tiles.q_padded), spec.q_len - 1)[None] + first_position(spec)
    if kv_positions is None:
        kv_positions = xp.minimum(xp.arange(tiles.kv_padded), spec.kv_len - 1)[None]
    q_positions, kv_positions = per_block(q_positions, nq), per_block(kv_positions, nk)
    q_min, q_max = q_positions.min(-1)[:, :, None], q_positions.max(-1)[:, :, None]
    kv_min, kv_max = kv_positions.min(-1)[:, None], kv_positions.max(-1)[:, None]
    starts = np.arange(nk) * tiles.kv_block
    some = xp.ones((1, nq, nk), bool)
    every = some & (starts + tiles.kv_block <= spec.kv_len)
    if spec.causal:
        some &= kv_min <= q_max
        every &= kv_max <= q_min
    if spec.window is not None:
        some &= kv_max > q_min - spec.window
        every &= kv_min > q_max - spec.window
        if not spec.causal:
            some &= kv_min < q_max + spec.window
            every &= kv_max < q_min + spec.window
    if spec.chunk is not None:
        q_first, q_last, kv_first, kv_last = (x // spec.chunk for x in (q_min, q_max, kv_min, kv_max))
        some &= (q_first <= kv_last) & (kv_first <= q_last)
        every &= (q_first == kv_last) & (kv_first == q_last)
    if masks.q_segments is not None and masks.kv_segments is not None:
        q_segments, kv_segments = per_block(masks.q_segments, nq), per_block(masks.kv_segments, nk)
        q_low, kv_low = (jnp.where(x == 0, FAR, x).min(-1) for x in (q_segments, kv_segments))
        q_high, kv_high = (jnp.where(x == 0, -FAR, x).max(-1) for x in (q_segments, kv_segments))
        some &= (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
        q_least, q_most = q_segments.min(-1)[:, :, None], q_segments.max(-1)[:, :, None]
        kv_least, kv_most = kv_segments.min(-1)[:, None], kv_segments.max(-1)[:, None]
        every &= (q_least == kv_most) & (kv_least == q_most) & (kv_most != 0)
    if masks.kv_ranges is not None:
        ranges = masks.kv_ranges.reshape(masks.kv_ranges.shape[0], nq, -1, 2)
        first, last = ranges[..., 0], ranges[..., 1]
        some &= (first.min(-1)[:, :, None] < starts + tiles.kv_block) & (last.max(-1)[:, :, None] > starts)
        every &= (first.max(-1)[:, :, None] <= starts) & (last.min(-1)[:, :, None] >= starts + tiles.kv_block)
    return BlockVisibility(some, every)


def block_bounds(
    spec: AttentionSpec, tiles: Tiling, masks: MaskArrays
) -> tuple[Int[Array, "groups q_blocks"], Int[Array, "groups q_blocks"]]:
    """First block of keys that some query of the block may see, and one past the last; equal where there is none."""
    nq, nk = tiles.q_blocks, tiles.kv_blocks
    may_see = block_visibility(spec, tiles, masks).some
    may_see = jnp.broadcast_to(may_see, (spec.batch, nq, nk)).reshape(tiles.groups, tiles.rows, nq, nk).any(1)
    index = jnp.arange(nk)
    low = jnp.where(may_see, index, nk).min(-1)
    high = jnp.where(may_see, index + 1, 0).max(-1)
    low = jnp.minimum(low, high)
    return low.astype(jnp.int32), high.astype(jnp.int32)


def section_bounds(spec: AttentionSpec, tiles: Tiling, masks: MaskArrays, *, of: str) -> Int[Array, "B blocks 4"]:
    """(low, full_low, full_high, high): [low, high) as `block_bounds`; in [full_low, full_high) everybody sees all.

    Args:
        of: "queries": blocks of keys for each block of queries; "keys": the other way round.
    """
    shape = (spec.batch, tiles.q_blocks, tiles.kv_blocks)
    some, every = (jnp.broadcast_to(x, shape) for x in block_visibility(spec, tiles, masks))
    if of == "keys":
        some, every = some.mT, every.mT
    size = every.shape[-1]
    index = jnp.arange(size)
    high = jnp.where(some, index + 1, 0).max(-1)
    low = jnp.minimum(jnp.where(some, index, size).min(-1), high)
    full_low = jnp.where(every, index, FAR).min(-1)
    full_high = jnp.where(every | (index < full_low[..., None]), size, index).min(-1)
    # Where nothing is full, all is masked: after it for queries, as under a causal mask, and before it for keys.
    none, instead = full_low == FAR, low if of == "queries" else high
    bounds = (low, jnp.where(none, instead, full_low), jnp.where(none, instead, full_high), high)
    return jnp.stack([x.astype(jnp.int32) for x in bounds], -1)
