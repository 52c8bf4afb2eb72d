"""The steps of a TPU kernel's grid: pairs of blocks in which something is visible, one after another, and no others."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llm_jax.kernels.flash_attention.bounds import Tiling, block_visibility
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays

FIRST, LAST, MASKED, UNMASKED = 1, 2, 4, 8
"""Bits of a step: the first or last one of its outer block; the tile needs a mask, or none. Neither: nothing to do."""
INNER, OUTER = 4, 17
"""Where the numbers of the blocks start in a step."""
MOST_OUTER, MOST_INNER = 2 ** (31 - OUTER), 2 ** (OUTER - INNER)
MOST_STEPS = 2**17
"""Half a MiB of the MiB of scalar memory that a TPU core has."""


class Schedule(NamedTuple):
    """`count` steps for each row of the batch (one row of steps where all share it), padded to `length`."""

    steps: Int[Array, "rows*length"]
    length: int
    count: int | Int[Array, ""]
    shared: bool

    def at(self, steps: Any, row: Any, step: Any) -> Any:
        """The step, read from `steps`, the prefetched array."""
        return steps[step if self.shared else row * self.length + step]


def outer(step: Any) -> Any:
    """The block that stays while the others pass: of queries, or of keys in the kernel for their gradient."""
    return step >> OUTER


def inner(step: Any) -> Any:
    """The block that passes."""
    return (step >> INNER) % MOST_INNER


def is_idle(step: Any) -> Any:
    """Whether it only repeats the blocks of the last step, of the last head of the group where there are several."""
    return step & (2**INNER - 1) == 0


def schedule(spec: AttentionSpec, tiles: Tiling, masks: MaskArrays, *, by_keys: bool = False) -> Schedule:
    """Ordered by blocks of queries, then of keys; `by_keys`: the other way round.

    A block with nothing visible has one step, to write its zeros. Rows with fewer steps than others repeat the blocks
    of their last one, so that nothing is copied, and do nothing.
    """
    if all(x is None for x in masks):
        flags = _flags(spec, tiles, masks, by_keys)
        count = int(np.count_nonzero(flags))
        return Schedule(jnp.asarray(_steps(flags, count)[0].reshape(-1)), count, count, shared=True)
    length = most_steps(spec, tiles, by_keys)
    steps, counts = _steps(_flags(spec, tiles, masks, by_keys), length)
    return Schedule(steps.reshape(-1), length, counts.max(), shared=steps.shape[0] == 1)


@functools.lru_cache(maxsize=256)
def most_steps(spec: AttentionSpec, tiles: Tiling, by_keys: bool = False) -> int:
    """Bound of the steps of one row, whatever the mask arrays hold. Positions that are given may be anything."""
    if spec.positions:
        spec = dataclasses.replace(spec, causal=False, window=None, chunk=None)
    return int(np.count_nonzero(_flags(spec, tiles, MaskArrays(), by_keys)))


def schedule_refusal(spec: AttentionSpec, tiles: Tiling, by_keys: bool) -> str | None:
    """Why the schedule does not fit; None if it does."""
    blocks = (tiles.kv_blocks, tiles.q_blocks) if by_keys else (tiles.q_blocks, tiles.kv_blocks)
    rows = spec.batch if spec.segments or spec.positions or spec.ranges else 1
    steps = rows * most_steps(spec, tiles, by_keys)
    if steps > MOST_STEPS or blocks[0] > MOST_OUTER or blocks[1] > MOST_INNER:
        return f"{steps} pairs of blocks are more than the {MOST_STEPS} that fit in scalar memory"
    return None


def _flags(spec: AttentionSpec, tiles: Tiling, masks: MaskArrays, by_keys: bool) -> Any:
    """[rows, outer, inner] of the bits of each pair of blocks; 0 where it has no step."""
    some, every = block_visibility(spec, tiles, masks)
    xp: Any = np if isinstance(some, np.ndarray) else jnp
    if by_keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    alone = ~some.any(-1, keepdims=True) & (np.arange(some.shape[-1]) == 0)
    stepped = some | alone
    nth = xp.cumsum(stepped, axis=-1)
    bits = xp.where(some, xp.where(every, UNMASKED, MASKED), 0)
    bits = bits + FIRST * (nth == 1) + LAST * (nth == nth[..., -1:])
    blocks = (np.arange(some.shape[1])[:, None] << OUTER) + (np.arange(some.shape[2]) << INNER)
    return xp.where(stepped, blocks + bits, 0).astype(np.int32)


def _steps(flags: Any, length: int) -> tuple[Any, Any]:
    """[rows, length] of the steps in order, and how many there are in each row."""
    xp: Any = np if isinstance(flags, np.ndarray) else jnp
    flags = flags.reshape(flags.shape[0], -1)
    counts = (flags != 0).sum(-1)
    order = xp.argsort(flags == 0, axis=-1, stable=True)[:, :length]
    steps = xp.take_along_axis(flags, order, axis=-1)
    last = xp.take_along_axis(steps, counts[:, None] - 1, axis=-1)
    idle = (last >> INNER) << INNER
    return xp.where(np.arange(length) < counts[:, None], steps, idle), counts


def blocks_of(spec: AttentionSpec, q_block: int, kv_block: int) -> Tiling:
    """One row of the batch at a time; blocks of at most these sizes, multiples of 128, about equal."""
    q_blocks, q_block = _blocks(spec.q_len, q_block)
    kv_blocks, kv_block = _blocks(spec.kv_len, kv_block)
    return Tiling(spec.batch, 1, q_blocks, q_block, kv_blocks, kv_block)


def _blocks(length: int, most: int) -> tuple[int, int]:
    size = math.ceil(length / math.ceil(length / most) / 128) * 128
    return math.ceil(length / size), size
