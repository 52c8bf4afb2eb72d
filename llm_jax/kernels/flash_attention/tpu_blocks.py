"""What the TPU kernels are given: arrays in their layout, and the block of each at a step of the schedule."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels.flash_attention.bounds import Tiling, pad_masks
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays
from llm_jax.kernels.flash_attention.tpu_schedule import Schedule, inner, is_idle, outer


class Extras(NamedTuple):
    """What takes part in a tile beside q, k and v. What is absent is None.

    Marks are what the mask knows of each query or key. Those along a tile's sublanes (the schedule's outer side) are
    columns of [length, marks], those along its lanes (the inner side) rows of [marks, length].
    """

    q_marks: Int[Array, "B ..."] | Any
    """Positions, segments, starts and ends of ranges, those that there are."""
    kv_marks: Int[Array, "B ..."] | Any
    """Positions and segments."""
    slopes: Float[Array, " N"] | Any
    sinks: Float[Array, " N"] | Any


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kernel. Its grid is (row of the batch, query head, step), or, `by_keys`, (row, key head, step,
    query head of the group)."""

    spec: AttentionSpec
    tiles: Tiling
    plan: Schedule
    by_keys: bool = False

    @property
    def grid(self) -> tuple[Any, ...]:
        """Of the kernel."""
        spec, count = self.spec, self.plan.count
        return (spec.batch, spec.kv_heads, count, spec.group) if self.by_keys else (spec.batch, spec.heads, count)

    def queries(self, width: int) -> pl.BlockSpec:
        """Of [B, N, T, width]."""
        return pl.BlockSpec((None, None, self.tiles.q_block, width), lambda *at: (*self._query_at(at), 0))

    def query_row(self) -> pl.BlockSpec:
        """Of [B, N, 1, T]."""

        def index(*at: Any) -> tuple[Any, ...]:
            row, head, block = self._query_at(at)
            return row, head, 0, block

        return pl.BlockSpec((None, None, 1, self.tiles.q_block), index)

    def keys(self, width: int) -> pl.BlockSpec:
        """Of [B, K, S, width]."""

        def index(*at: Any) -> tuple[Any, ...]:
            head = at[1] if self.by_keys else at[1] // self.spec.group
            return at[0], head, self._kv_block(at), 0

        return pl.BlockSpec((None, None, self.tiles.kv_block, width), index)

    def extras(self, given: Extras) -> Extras:
        """Of `given`."""
        tiles = self.tiles
        return Extras(
            self._marks(given.q_marks, tiles.q_block, lambda at: self._query_at(at)[2], columns=not self.by_keys),
            self._marks(given.kv_marks, tiles.kv_block, self._kv_block, columns=self.by_keys),
            *(x if x is None else pl.BlockSpec(memory_space=pltpu.SMEM) for x in (given.slopes, given.sinks)),
        )

    @staticmethod
    def _marks(marks: Array | None, size: int, block: Any, *, columns: bool) -> Any:
        if marks is None:
            return None
        if columns:
            return pl.BlockSpec((None, size, marks.shape[2]), lambda *at: (at[0], block(at), 0))
        return pl.BlockSpec((None, marks.shape[1], size), lambda *at: (at[0], 0, block(at)))

    def _step(self, at: tuple[Any, ...]) -> Any:
        return self.plan.at(at[-1], at[0], at[2])

    def _query_at(self, at: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        step = self._step(at)
        if not self.by_keys:
            return at[0], at[1], outer(step)
        member = jnp.where(is_idle(step), self.spec.group - 1, at[3])
        return at[0], at[1] * self.spec.group + member, inner(step)

    def _kv_block(self, at: tuple[Any, ...]) -> Any:
        return outer(self._step(at)) if self.by_keys else inner(self._step(at))


def extras(blocks: Blocks, masks: MaskArrays, slopes: Array | None, sinks: Array | None) -> Extras:
    """The arrays, padded to whole blocks; slopes and sinks in float32."""
    spec, tiles = blocks.spec, blocks.tiles
    masks = pad_masks(spec, tiles, masks)
    kv_positions = masks.kv_positions
    if spec.positions and kv_positions is None:
        kv_positions = jnp.broadcast_to(jnp.arange(tiles.kv_padded), (spec.batch, tiles.kv_padded))
    ranges = (None, None) if masks.kv_ranges is None else (masks.kv_ranges[..., 0], masks.kv_ranges[..., 1])

    def marks(columns: bool, *arrays: Array | None) -> Array | None:
        present = [x for x in arrays if x is not None]
        return jnp.stack(present, 2 if columns else 1) if present else None

    return Extras(
        marks(not blocks.by_keys, masks.q_positions, masks.q_segments, *ranges),
        marks(blocks.by_keys, kv_positions, masks.kv_segments),
        *(None if x is None else x.astype(jnp.float32) for x in (slopes, sinks)),
    )


def by_heads(x: Float[Array, "B L N D"], padded: int) -> Float[Array, "B N padded D"]:
    """Heads before the length, as the kernels take them; padding is 0."""
    return jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def rows_by_heads(x: Float[Array, "B T N"], padded: int, fill: float = 0) -> Float[Array, "B N 1 padded"]:
    """A number per query and head, with the queries in the lanes; padding is `fill`."""
    widths = (0, 0), (0, padded - x.shape[1]), (0, 0)
    return jnp.pad(x, widths, constant_values=fill).swapaxes(1, 2)[:, :, None]


def by_length(x: Float[Array, "B N padded D"], length: int) -> Float[Array, "B length N D"]:
    """The inverse of `by_heads`."""
    return x.swapaxes(1, 2)[:, :length]
