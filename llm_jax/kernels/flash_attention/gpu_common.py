"""What the Hopper kernels share: matrix products, sides of a tile of scores, streams of blocks to shared memory."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, alibi_bias, first_position, visible
from llm_jax.kernels.mosaic_gpu import swizzled
from llm_jax.kernels.mosaic_gpu_values import LOG2E, accumulate, numbers
from llm_jax.kernels.platform import interpreted


def matrices(shape: tuple[int, ...], dtype: Any, *, summed: int) -> Any:
    """Shared memory of matrices in 16 bits, laid out as TMA writes it and wgmma reads it.

    `summed`: the size of the axis that a product sums over, a multiple of the width of a swizzled tile.
    """
    return plgpu.SMEM(shape, dtype, transforms=swizzled(math.gcd(shape[-1], summed)))


def two_products(
    first: Sequence[tuple[Any, Any]],
    second: Sequence[tuple[Any, Any]],
    between: Callable[[jax.Array], Any],
) -> tuple[Any, jax.Array]:
    """(between(product(first)), product(second)); the second is computed during `between`."""

    def body(first_acc: Any, second_acc: Any) -> tuple[Any, jax.Array]:
        for a, b in first:
            plgpu.wgmma(first_acc, a, b)
        for a, b in second:
            plgpu.wgmma(second_acc, a, b)
        result = between(plgpu.wgmma_accumulator_load(first_acc, wait_n=len(second)))
        return result, second_acc[...]

    shape = (first[0][0].shape[0], first[0][1].shape[1])
    accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
    return pl.run_scoped(body, accumulator, accumulator)


def accumulate_both(
    sums: tuple[jax.Array, jax.Array], pairs: tuple[tuple[jax.Array, Any], tuple[Callable[[], jax.Array], Any]]
) -> Any:
    """sums[0] + a @ b and sums[1] + a() @ b, a in registers; the second a() is computed during the first product."""
    (a, b), (later_a, later_b) = pairs
    if interpreted():
        return accumulate(sums[0], a, b), accumulate(sums[1], later_a(), later_b)

    def body(accs: Any) -> None:
        plgpu.wgmma(accs[0], a, b)
        plgpu.wgmma(accs[1], later_a(), later_b)

    return pl.run_state(body)(tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in sums))


def spread(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along `axis` of a matrix, repeated along the other one."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def load(ref: Any, axis: int) -> jax.Array:
    """A vector that lies along `axis` of results of wgmma."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def read_bounds(bounds: Any, batch: Any, block: Any) -> tuple[jax.Array, ...]:
    """`section_bounds` of a block. Inside `shard_map` what is read has a type that loops in a kernel do not keep; what
    is computed has not."""
    return tuple(bounds[batch, block, i] + 0 for i in range(4))


class LazyRows:
    """`Rows` whose parts are made when they are first asked for: of a vector that nothing uses, the compiler keeps
    numbers for which it finds no layout, after trying those of all others for minutes."""

    def __init__(self, **parts: Callable[[], Any]):
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        made = self._parts[name]()
        setattr(self, name, made)
        return made


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of scores: its first query and key, and which of its axes has the queries."""

    spec: AttentionSpec
    masks: MaskArrays
    """References to [B, padded length] arrays; ranges as a pair of such."""
    batch: Any
    q_start: Any
    kv_start: Any
    shape: tuple[int, int]
    q_axis: int

    def _index(self, axis: int, start: Any, dtype: Any = jnp.int32) -> jax.Array:
        return spread((start + numbers(self.shape[axis], axis)).astype(dtype), self.shape, axis)

    def _vector(self, ref: Any, axis: int, start: Any) -> Any:
        if ref is None:
            return None
        size = self.shape[axis]
        return spread(load(ref.at[self.batch, pl.ds(start, size)], axis), self.shape, axis)

    def sides(self) -> tuple[Any, Any]:
        """Index, position, segment and range of each query and of each key as in `Rows`, over the whole tile."""
        masks: Any = self.masks

        def side(axis: int, start: Any, first: int, positions: Any, segments: Any, ranges: tuple[Any, Any]) -> LazyRows:
            def position() -> jax.Array:
                return made.index + first if positions is None else self._vector(positions, axis, start)

            made = LazyRows(
                index=lambda: self._index(axis, start),
                position=position,
                segment=lambda: self._vector(segments, axis, start),
                start=lambda: self._vector(ranges[0], axis, start),
                end=lambda: self._vector(ranges[1], axis, start),
            )
            return made

        nothing = None, None
        first = first_position(self.spec)
        rows = (self.q_start, first, masks.q_positions, masks.q_segments, masks.kv_ranges or nothing)
        keys = (self.kv_start, 0, masks.kv_positions, masks.kv_segments, nothing)
        return side(self.q_axis, *rows), side(1 - self.q_axis, *keys)

    def bias(self, slope: Any) -> jax.Array:
        """ALiBi's, -slope · |i - j|."""
        masks, both = self.masks, (self.q_start, self.kv_start)
        if masks.q_positions is not None or masks.kv_positions is not None:
            return alibi_bias(slope, *self.sides())
        # A number in float32 per row and per column, and not one per pair. Columns hold the distance of the starts:
        # what does not change from tile to tile would be kept in registers.
        start, other = both if self.q_axis == 1 else both[::-1]
        first = first_position(self.spec) if self.q_axis == 1 else -first_position(self.spec)
        distance = self._index(1, start - other + first, jnp.float32) - self._index(0, 0, jnp.float32)
        if not self.spec.causal:
            return -slope * jnp.abs(distance)
        return (-slope if self.q_axis == 1 else slope) * distance  # nobody sees the other sign

    def seen(self, rows: Any, keys: Any) -> jax.Array:
        """Who sees whom, and nobody sees keys past the last; where keys are the rows, these are dropped later."""
        mask = visible(self.spec, rows, keys)
        if self.q_axis == 1 and mask is not None:
            return mask
        real = keys.index < self.spec.kv_len
        return real if mask is None else mask & real


@dataclasses.dataclass(frozen=True)
class Scores:
    """From products of queries and keys to logits in base 2."""

    spec: AttentionSpec
    slope: Any = None

    def of(self, raw: jax.Array, tile: Tile, *, masked: bool) -> tuple[jax.Array, float]:
        """(logits, factor): the logits are to be multiplied by the factor, which is positive; -inf if not visible."""
        return self._biased(*self.soft_capped(raw), tile, masked)

    def _biased(self, logits: jax.Array, factor: float, tile: Tile, masked: bool) -> tuple[jax.Array, float]:
        if self.slope is not None:
            logits += tile.bias(self.slope * (LOG2E / factor))
        if masked:
            logits = jnp.where(tile.seen(*tile.sides()), logits, -jnp.inf)
        return logits, factor

    def probabilities(
        self, raw: jax.Array, tile: Tile, lse: jax.Array, *, masked: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Of logits with this log-sum-exp (over the tile), and where there is a cap, d capped / d uncapped."""
        capped, factor = self.soft_capped(raw)
        logits, factor = self._biased(capped, factor, tile, masked)
        probs = jnp.exp2(logits * factor - lse)
        return probs, None if self.spec.softcap is None else 1.0 - capped * capped

    def soft_capped(self, raw: jax.Array) -> tuple[jax.Array, float]:
        """The logits before the bias, with their factor."""
        scale, cap = self.spec.scale, self.spec.softcap
        if cap is not None:
            return jnp.tanh(raw * (scale / cap)), cap * LOG2E
        if scale > 0:
            return raw, scale * LOG2E
        return raw * (scale * LOG2E), 1.0


def masked_ends(spec: AttentionSpec, *, of: str, kv_block: int) -> tuple[bool, bool]:
    """Whether the blocks before those that everybody sees may need a mask, and those after; `of` as section_bounds."""
    both = spec.segments or spec.positions or spec.ranges or spec.window is not None or spec.chunk is not None
    if of == "queries":
        return both, both or spec.causal or spec.kv_len % kv_block != 0
    return both or spec.causal or spec.kv_len % kv_block != 0, both


def sections(bounds: tuple[Any, ...], ends: tuple[bool, bool], block: Callable[..., Any], state: Any) -> Any:
    """Runs `block(index, state, masked=)` over `section_bounds`: masked blocks, those that everybody sees, masked ones.

    Sections that a mask never has are left out of the program.
    """
    low, full_low, full_high, high = bounds
    head, tail = ends
    if head:
        state = lax.fori_loop(low, full_low, functools.partial(block, masked=True), state)
    state = lax.fori_loop(full_low, full_high, functools.partial(block, masked=False), state)
    if tail:
        state = lax.fori_loop(full_high, high, functools.partial(block, masked=True), state)
    return state


@dataclasses.dataclass(frozen=True)
class Stream:
    """Blocks that come from global memory in order, one a step, through `stages` buffers in turn."""

    stages: int
    parts: tuple[tuple[Callable[..., Any], Any], ...]
    """Of each part: indices of a block -> its reference in global memory, and its buffers [stages, ...]."""
    full: Any
    """A barrier per buffer: its parts have arrived."""
    empty: Any
    """A barrier per buffer: every reader is done with it."""

    def slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.stages))

    def fetch(self, step: Any, *block: Any) -> None:
        """Starts the copies of the block of this step once its buffer is free."""
        slot = self.slot(step)

        @pl.when(step >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[slot])

        for source, buffers in self.parts:
            plgpu.copy_gmem_to_smem(source(*block), buffers.at[slot], self.full.at[slot])

    def start(self, steps: Any, block: Callable[[int], tuple[Any, ...]]) -> None:
        """Fetches as many of the first blocks as there are buffers; `block`: step -> indices."""
        for step in range(self.stages):
            pl.when(step < steps)(lambda step=step: self.fetch(jnp.int32(step), *block(step)))

    def refill(self, step: Any, there: Any, *block: Any) -> None:
        """Fetches a block, if it is `there`, into the buffer of the step before: the block of step + stages - 1."""
        pl.when((step > 0) & there)(lambda: self.fetch(step + self.stages - 1, *block))

    def advance(self, step: Any, there: Any, *block: Any) -> None:
        """Fetches the next block, at the start of `step`. With 3 stages, other warpgroups may be a step behind."""
        self.refill(step - (self.stages - 2), there, *block)

    def wait(self, step: Any) -> None:
        """Until block `step` has arrived."""
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def at(self, part: int, step: Any) -> Any:
        """The buffer that holds `part` of block `step`."""
        return self.parts[part][1].at[self.slot(step)]

    def release(self, step: Any) -> None:
        """This reader is done with block `step`."""
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])
