"""Sizes of the Hopper kernels' tiles, and why these."""

from dataclasses import dataclass

from llm_jax.kernels.flash_attention.spec import AttentionSpec

WARPGROUPS = 2
"""That compute. Each has its own 64 or more rows of the tile."""


@dataclass(frozen=True)
class ForwardTiles:
    """Of the forward kernel. A warpgroup holds q_block x (value size + kv_block) float32 numbers in registers."""

    q_block: int = 64
    """Queries of a warpgroup."""
    kv_block: int = 128
    stages: int = 2
    """Blocks of keys, and of values, in shared memory."""
    producer: int = 1
    """Warpgroups that only fetch. With 1, a thread has 168 registers; with 0, 255, and a computing one fetches."""


@dataclass(frozen=True)
class BackwardTiles:
    """Of the two backward kernels; dq_: queries of a warpgroup, dkv_: keys of a warpgroup."""

    dq_q_block: int = 64
    dq_kv_block: int = 64
    dq_stages: int = 3
    dkv_kv_block: int = 64
    dkv_q_block: int = 64
    dkv_stages: int = 3
    dkv_panels: int = 1
    """1: each warpgroup has its own keys; 2: both have the same, and each sums half the columns of the gradients."""


def forward_tiles(spec: AttentionSpec, head_dim: int, value_dim: int) -> ForwardTiles:
    """The default for padded head sizes. Masks that are data take registers, as do large values."""
    data = spec.segments or spec.positions or spec.ranges
    if value_dim > 128:
        return ForwardTiles(kv_block=64, producer=0)
    if head_dim > 128:
        return ForwardTiles(kv_block=96, producer=0)
    return ForwardTiles(producer=0 if data else 1)


def backward_tiles(head_dim: int, value_dim: int) -> BackwardTiles:
    """The default for padded head sizes."""
    if value_dim > 128:
        return BackwardTiles(dq_kv_block=32, dkv_panels=2, dkv_stages=2)
    if head_dim > 128:
        return BackwardTiles(dkv_panels=2)
    return BackwardTiles()
