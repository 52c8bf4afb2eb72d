"""Which rows belong to which group, as a list of tiles to visit: what the TPU and GPU kernels' grids run over."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Visits(NamedTuple):
    """Tiles of rows in the order of the groups; a tile that groups share is visited once for each of them.

    Of the entries of `group` and `first` the first `count` are visits; the length is the most that there can be.
    """

    count: Int[Array, ""]
    group: Int[Array, " visits"]
    """May be E: the rows behind the last group."""
    first: Int[Array, " visits"]
    """First row of the tile, which may be one of the groups before."""
    begin: Int[Array, " groups"]
    end: Int[Array, " groups"]
    """Rows [begin, end) of each group."""


def visits(
    group_sizes: Int[Array, " E"], rows: int, tile: int, *, align: int, behind: bool, empty: bool = False
) -> Visits:
    """The visits of `rows` sorted rows in tiles of `tile`.

    Sizes that are negative count as 0, and no group reaches behind the last row: whatever the sizes, a kernel that
    follows the list stays inside its arrays.

    Args:
        align: tiles of a group begin `tile` rows after each other, the first of them at a multiple of this.
        behind: rows behind the last group are visited too, as group E.
        empty: a group without rows is visited once.
    """
    ends = jnp.minimum(jnp.cumsum(jnp.clip(group_sizes, 0, rows).astype(jnp.int32)), rows)
    if behind:
        ends = jnp.append(ends, rows).astype(jnp.int32)
    begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    origins = begins // align * align
    tiles = jnp.where(ends > begins, (ends - origins + tile - 1) // tile, int(empty))
    last = jnp.cumsum(tiles)
    numbers = jnp.arange(most_visits(rows, ends.shape[0], tile, align), dtype=jnp.int32)
    # Every number beside every group: the default is a loop of gathers, in every product of a layer.
    found = jnp.searchsorted(last, numbers, side="right", method="compare_all")
    group = jnp.minimum(found, ends.shape[0] - 1).astype(jnp.int32)
    first = origins[group] + (numbers - (last - tiles)[group]) * tile
    # The tile of an empty group at the end would begin behind the last row.
    return Visits(last[-1], group, jnp.clip(first, 0, (rows - 1) // align * align), begins, ends)


def most_visits(rows: int, groups: int, tile: int, align: int) -> int:
    """How many there can be."""
    if align == tile:  # a tile more for each group that begins within one
        return -(-rows // tile) + groups - 1
    return max(groups, (rows + groups * (tile + align - 2)) // tile)
