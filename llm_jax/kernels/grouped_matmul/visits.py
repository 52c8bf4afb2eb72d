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
    """First row of the tile, `begin` of its group at the earliest unless tiles are aligned."""
    begin: Int[Array, " groups"]
    end: Int[Array, " groups"]
    """Rows [begin, end) of each group."""


def visits(
    group_sizes: Int[Array, " E"], rows: int, tile: int, *, aligned: bool, behind: bool, empty: bool = False
) -> Visits:
    """The visits of `rows` sorted rows in tiles of `tile`.

    Sizes that are negative count as 0, and no group reaches behind the last row: whatever the sizes, a kernel that
    follows the list stays inside its arrays.

    Args:
        aligned: tiles begin at multiples of `tile`; else each group's tiles begin with the group.
        behind: rows behind the last group are visited too, as group E.
        empty: a group without rows is visited once.
    """
    ends = jnp.minimum(jnp.cumsum(jnp.clip(group_sizes, 0, rows).astype(jnp.int32)), rows)
    if behind:
        ends = jnp.append(ends, rows).astype(jnp.int32)
    begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    origins = begins // tile * tile if aligned else begins
    tiles = jnp.where(ends > begins, (ends - origins + tile - 1) // tile, int(empty))
    last = jnp.cumsum(tiles)
    # Each group but the first may add one tile to those of the rows; an empty one, which is visited, adds no more.
    numbers = jnp.arange(-(-rows // tile) + ends.shape[0] - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, numbers, side="right"), ends.shape[0] - 1).astype(jnp.int32)
    first = origins[group] + (numbers - (last - tiles)[group]) * tile
    # An aligned tile of an empty group at the end would begin behind the last row.
    first = jnp.clip(first, 0, (rows - 1) // tile * tile if aligned else rows - 1)
    return Visits(last[-1], group, first, begins, ends)
