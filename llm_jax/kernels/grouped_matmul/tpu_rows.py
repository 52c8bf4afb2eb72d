"""Rows that a TPU kernel takes from x itself: copied one by one into a tile, while the one before is multiplied.

A copy takes whole words of 32 bits. So x is made into such words before the kernel, in one pass over it (x, not the
rows): of 16-bit numbers a word has one of the first half of the columns below and one of the second half above, and the
kernel sums over both halves. Each row lies in one piece, `[T, 1, H]`, for a tile of 8 rows interleaves them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32


def parts_of(dtype: Any) -> int:
    """Numbers in a word."""
    return 4 // jnp.dtype(dtype).itemsize


def words(x: Float[Array, "T K"], width: int) -> UInt32[Array, "T 1 H"]:
    """`width` words for each row, with zeros behind the last column."""
    parts = parts_of(x.dtype)
    x = jnp.pad(x, ((0, 0), (0, parts * width - x.shape[1])))
    if parts == 1:
        return lax.bitcast_convert_type(x, jnp.uint32)[:, None]
    low, high = (lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in jnp.split(x, 2, axis=1))
    return (low | high << 16)[:, None]


def numbers(kept: UInt32[Array, "m a"], dtype: Any) -> list[Float[Array, "m a"]]:
    """The columns of the first half, and those of the second."""
    if parts_of(dtype) == 1:
        return [lax.bitcast_convert_type(kept, dtype)]
    # A bfloat16 is the upper half of a float32.
    both = kept << 16, kept & jnp.uint32(0xFFFF0000)
    return [lax.bitcast_convert_type(half, jnp.float32).astype(dtype) for half in both]


@dataclass(frozen=True)
class Taken:
    """Tiles of `height` rows, visited in order, each once or several times on end."""

    rows: Int[Array, "tiles 1 height"]
    height: int

    @classmethod
    def of(cls, rows: Int[Array, " M"], height: int) -> "Taken":
        """Of rows [M]; those behind the last, which fill its tile, are row 0 of x and not stored."""
        return cls(jnp.pad(rows, (0, -rows.shape[0] % height)).reshape(-1, 1, height), height)

    def specs(self, first: Callable[..., Any]) -> list[pl.BlockSpec]:
        """Of the rows of a tile, those of the next one, and x; `first(*indices of the grid, *scalars)` is the first row
        of the tile."""

        def at(ahead: int) -> Callable[..., Any]:
            last = self.rows.shape[0] - 1
            return lambda *indices: (jnp.minimum(first(*indices) // self.height + ahead, last), 0, 0)

        block = (None, 1, self.height)
        of_rows = [pl.BlockSpec(block, at(ahead), memory_space=pltpu.SMEM) for ahead in (0, 1)]
        return [*of_rows, pl.BlockSpec(memory_space=pl.ANY)]

    def scratch(self, width: int) -> list[Any]:
        """Two tiles of words, and their semaphores."""
        return [pltpu.VMEM((2, self.height, width), jnp.uint32), pltpu.SemaphoreType.DMA((2,))]


def bring(refs: Sequence[Any], buffers: Any, semaphores: Any, tile: Any, last: Any, columns: Any) -> None:
    """Waits for the rows of a tile, at its first visit, and starts the copies of the next one up to tile `last`.

    Args:
        refs: as `Taken.specs` gives them.
        columns: the words of each row that are copied, as many as a buffer has.
    """
    now, following, x = refs

    def start(rows: Any, slot: Any) -> None:
        def one(r: Any, _: None) -> None:
            source, target = x.at[rows[0, r], :, columns], buffers.at[slot, pl.ds(r, 1)]
            pltpu.make_async_copy(source, target, semaphores.at[slot]).start()

        lax.fori_loop(0, buffers.shape[1], one, None)

    slot = lax.rem(tile, 2)
    pl.when(tile == 0)(lambda: start(now, slot))
    pl.when(tile < last)(lambda: start(following, 1 - slot))
    # One wait for as many bytes as all copies of the tile have.
    pltpu.make_async_copy(buffers.at[slot], buffers.at[slot], semaphores.at[slot]).wait()
