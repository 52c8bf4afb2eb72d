"""Sizes of the tiles, and which blocks of keys a block of queries may see."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int

from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, first_position

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
    block = _block(spec, platform)
    q_blocks, q_block = _blocks(spec.q_len, block)
    # Few queries (decoding) leave room for more keys.
    kv_blocks, kv_block = _blocks(spec.kv_len, min(max(block, block * block // q_block), 4 * block))
    row_bytes = 4 * spec.heads * q_block * kv_block
    wanted = max(1, TILE_BYTES.get(platform, 256 * 2**20) // row_bytes)
    rows = max(n for n in range(1, min(wanted, spec.batch) + 1) if spec.batch % n == 0)
    return Tiling(spec.batch // rows, rows, q_blocks, q_block, kv_blocks, kv_block)


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
    masks = pad_masks(spec, tiles, masks)
    nq, nk = tiles.q_blocks, tiles.kv_blocks

    def per_block(x: Array, blocks: int) -> Array:
        return x.reshape(x.shape[0], blocks, -1)

    q_positions, kv_positions = masks.q_positions, masks.kv_positions
    if q_positions is None:
        q_positions = jnp.minimum(jnp.arange(tiles.q_padded), spec.q_len - 1)[None] + first_position(spec)
    if kv_positions is None:
        kv_positions = jnp.minimum(jnp.arange(tiles.kv_padded), spec.kv_len - 1)[None]
    q_positions, kv_positions = per_block(q_positions, nq), per_block(kv_positions, nk)
    q_min, q_max = q_positions.min(-1)[:, :, None], q_positions.max(-1)[:, :, None]
    kv_min, kv_max = kv_positions.min(-1)[:, None], kv_positions.max(-1)[:, None]
    may_see = jnp.ones((1, nq, nk), bool)
    if spec.causal:
        may_see &= kv_min <= q_max
    if spec.window is not None:
        may_see &= kv_max > q_min - spec.window
        if not spec.causal:
            may_see &= kv_min < q_max + spec.window
    if spec.chunk is not None:
        may_see &= (q_min // spec.chunk <= kv_max // spec.chunk) & (kv_min // spec.chunk <= q_max // spec.chunk)
    if masks.q_segments is not None and masks.kv_segments is not None:
        q_segments, kv_segments = per_block(masks.q_segments, nq), per_block(masks.kv_segments, nk)
        q_low, kv_low = (jnp.where(x == 0, FAR, x).min(-1) for x in (q_segments, kv_segments))
        q_high, kv_high = (jnp.where(x == 0, -FAR, x).max(-1) for x in (q_segments, kv_segments))
        may_see &= (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
    if masks.kv_ranges is not None:
        ranges = masks.kv_ranges.reshape(masks.kv_ranges.shape[0], nq, -1, 2)
        starts = jnp.arange(nk) * tiles.kv_block
        may_see &= ranges[..., 0].min(-1)[:, :, None] < starts + tiles.kv_block
        may_see &= ranges[..., 1].max(-1)[:, :, None] > starts
    may_see = jnp.broadcast_to(may_see, (spec.batch, nq, nk)).reshape(tiles.groups, tiles.rows, nq, nk).any(1)
    index = jnp.arange(nk)
    low = jnp.where(may_see, index, nk).min(-1)
    high = jnp.where(may_see, index + 1, 0).max(-1)
    low = jnp.minimum(low, high)
    return low.astype(jnp.int32), high.astype(jnp.int32)
