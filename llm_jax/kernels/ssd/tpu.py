"""Chunks of tokens on a TPU: heads in panels of 128 lanes, the states of a group's heads in VMEM from chunk to chunk.

The grid goes over (row, group, chunk, tile of heads), the last two in order, so that what the heads of a group share
is read, multiplied and summed once per chunk. Running sums of the exponents are made before the kernels.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.platform import tpu_refusal
from llm_jax.kernels.ssd.decay import sums
from llm_jax.kernels.ssd.spec import SsdSpec
from llm_jax.kernels.tiles import tiles

LANES = 128
STATE_BYTES = 16 * 2**20
"""Most that the states of a group may take of the VMEM."""


@dataclass(frozen=True)
class Tiles:
    """Sizes that may be tuned."""

    chunk: int = 128
    """Tokens of a chunk, unless the call says it."""
    lanes: int = 512
    """Most channels (heads times head size) of a tile."""


@dataclass(frozen=True)
class Layout:
    """How a call is cut."""

    chunk: int
    chunks: int
    head_dim: int
    """Padded, so that heads fill panels of 128 lanes."""
    heads: int
    """Of a tile; they are of one group."""
    tiles: int
    """Of a group."""
    states: int
    """Padded to whole lanes."""

    @property
    def width(self) -> int:
        """Channels of a tile."""
        return self.heads * self.head_dim


def supports(spec: SsdSpec, platform: str) -> str | None:
    """TPUs; float32 and bfloat16; as long as the states of a group fit in the VMEM."""
    refusal = tpu_refusal(platform)
    if refusal is not None:
        return refusal
    if spec.dtype == "float16":
        return "TPUs multiply bfloat16 and float32, not float16"
    if spec.length == 1:
        return "a single token is no chunk"
    if spec.chunk_size is not None and spec.chunk_size % LANES:
        return f"chunks of whole multiples of {LANES} tokens, not of {spec.chunk_size}"
    cut = layout(spec, Tiles())
    size = 4 * cut.tiles * cut.width * cut.states
    if size > STATE_BYTES:
        return f"the states of a group take {size >> 20} MiB, more than the {STATE_BYTES >> 20} of VMEM set aside"
    return None


def layout(spec: SsdSpec, sizes: Tiles) -> Layout:
    """Heads in whole panels of 128 lanes."""
    chunk = spec.chunk_size or sizes.chunk
    head_dim = LANES * math.ceil(spec.head_dim / LANES)
    if spec.head_dim <= LANES // 2 and spec.per_group % 2 == 0:
        head_dim = LANES // 2
    fitting = [
        heads for heads in range(1, spec.per_group + 1) if spec.per_group % heads == 0 and heads * head_dim % LANES == 0
    ]
    heads = max([n for n in fitting if n * head_dim <= sizes.lanes], default=fitting[0])
    return Layout(
        chunk,
        math.ceil(spec.length / chunk),
        head_dim,
        heads,
        spec.per_group // heads,
        LANES * math.ceil(spec.states / LANES),
    )


def forward(
    spec: SsdSpec,
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    skip: Float[Array, " H"],
    starts: Bool[Array, "B T"] | None,
    initial_state: Float[Array, "B H P N"],
    *,
    keep_states: bool,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"], Float[Array, "B chunks N HP"] | None]:
    """Output in x's dtype, float32 final state, and if asked for the states before each chunk."""
    from llm_jax.kernels.ssd import tpu_forward  # imports Pallas

    cut = _cut(spec)
    arrays = _tokens(cut, x), *_rows(spec, cut, dt, A, starts), _groups(cut, B), _groups(cut, C)
    arrays = *arrays, _per_lane(cut, skip), _states(cut, initial_state)
    y, final, states = tpu_forward.run(spec, cut, *arrays, keep_states=keep_states)
    return _of_tokens(spec, cut, y), _of_states(spec, cut, final), states


def backward(
    spec: SsdSpec,
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    skip: Float[Array, " H"],
    starts: Bool[Array, "B T"] | None,
    states: Float[Array, "B chunks N HP"],
    d_out: Float[Array, "B T H P"],
    d_final: Float[Array, "B H P N"],
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Gradients of x, dt, A, B, C, skip and the initial state."""
    from llm_jax.kernels.ssd import tpu_backward  # imports Pallas

    cut = _cut(spec)
    arrays = _tokens(cut, x), *_rows(spec, cut, dt, A, starts), _groups(cut, B), _groups(cut, C), _per_lane(cut, skip)
    dx, d_exponent, d_scale, dB, dC, d_skip, d_initial = tpu_backward.run(
        spec, cut, *arrays, states, _tokens(cut, d_out), _states(cut, d_final)
    )
    d_exponent, d_scale = (_of_rows(spec, y) for y in (d_exponent, d_scale))
    if starts is not None:
        d_exponent = jnp.where(starts[..., None], 0.0, d_exponent)
    return (
        _of_tokens(spec, cut, dx),
        (A.astype(jnp.float32) * d_exponent + d_scale).astype(dt.dtype),
        jnp.sum(d_exponent * dt.astype(jnp.float32), axis=(0, 1)).astype(A.dtype),
        _of_groups(spec, dB),
        _of_groups(spec, dC),
        jnp.sum(d_skip.reshape(spec.batch, spec.heads, -1), axis=(0, 2)).astype(skip.dtype),
        _of_states(spec, cut, d_initial),
    )


def _cut(spec: SsdSpec) -> Layout:
    shape = f"P{spec.head_dim} N{spec.states}"
    return layout(spec, tiles("ssd", "tpu", dtype=spec.dtype, shape=shape, default=Tiles()))


def _padded(x: Array, **sizes: int) -> Array:
    """Zeros behind axis i up to size `axis_i`."""
    pads = [(0, sizes.get(f"axis_{i}", size) - size) for i, size in enumerate(x.shape)]
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def _tokens(cut: Layout, x: Float[Array, "B T H P"]) -> Float[Array, "B t HP"]:
    """Tokens beyond the end have dt 0: they leave the state as it is."""
    x = _padded(x, axis_1=cut.chunks * cut.chunk, axis_3=cut.head_dim)
    return x.reshape(*x.shape[:2], -1)


def _of_tokens(spec: SsdSpec, cut: Layout, x: Float[Array, "B t HP"]) -> Float[Array, "B T H P"]:
    return x.reshape(*x.shape[:2], spec.heads, cut.head_dim)[:, : spec.length, :, : spec.head_dim]


def _groups(cut: Layout, x: Float[Array, "B T G N"]) -> Float[Array, "B t GN"]:
    x = _padded(x, axis_1=cut.chunks * cut.chunk, axis_3=cut.states)
    return x.reshape(*x.shape[:2], -1)


def _of_groups(spec: SsdSpec, x: Float[Array, "B t GN"]) -> Float[Array, "B T G N"]:
    return x.reshape(*x.shape[:2], spec.groups, -1)[:, : spec.length, :, : spec.states]


def _states(cut: Layout, x: Float[Array, "B H P N"]) -> Float[Array, "B N HP"]:
    x = jnp.moveaxis(_padded(x, axis_2=cut.head_dim, axis_3=cut.states), 3, 1)
    return x.reshape(*x.shape[:2], -1)


def _of_states(spec: SsdSpec, cut: Layout, x: Float[Array, "B N HP"]) -> Float[Array, "B H P N"]:
    x = x.reshape(*x.shape[:2], spec.heads, cut.head_dim)[:, : spec.states, :, : spec.head_dim]
    return jnp.moveaxis(x, 1, 3)


def _per_lane(cut: Layout, x: Float[Array, " H"]) -> Float[Array, "1 HP"]:
    return jnp.repeat(x.astype(jnp.float32), cut.head_dim)[None]


def _rows(spec: SsdSpec, cut: Layout, dt: Array, A: Array, starts: Array | None) -> tuple[Array, Array | None]:
    """Per token and head [3, B, tiles, heads, t]: dt, running sums of the exponents, coarse and fine. Per token
    [B, 1, t]: documents that began in its chunk."""
    length = cut.chunks * cut.chunk
    dt = _padded(dt.astype(jnp.float32), axis_1=length)
    cut_dt = dt.reshape(spec.batch * cut.chunks, cut.chunk, spec.groups, spec.per_group)
    cut_starts = None if starts is None else _padded(starts, axis_1=length).reshape(-1, cut.chunk)
    rates = A.astype(jnp.float32).reshape(spec.groups, spec.per_group)
    made = sums(jnp.moveaxis(cut_dt, 1, 3), rates, cut_starts)
    per_head = jnp.stack([jnp.moveaxis(cut_dt, 1, 3), made.coarse, made.fine])
    per_head = per_head.reshape(3, spec.batch, cut.chunks, -1, cut.heads, cut.chunk)
    per_head = jnp.moveaxis(per_head, 2, 4).reshape(3, spec.batch, -1, cut.heads, length)
    return per_head, None if made.run is None else made.run.astype(jnp.float32).reshape(spec.batch, 1, length)


def _of_rows(spec: SsdSpec, x: Float[Array, "B tiles heads t"]) -> Float[Array, "B T H"]:
    return jnp.swapaxes(x.reshape(spec.batch, spec.heads, -1), 1, 2)[:, : spec.length]
