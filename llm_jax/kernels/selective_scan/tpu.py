"""Token by token on a TPU: channels along lanes, the state of a tile of channels in registers and VMEM.

The grid goes over (row, tile of channels, chunk), the last in order. The forward pass keeps the state before each
chunk; the backward pass makes the states of one chunk again, in VMEM.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.platform import tpu_refusal
from llm_jax.kernels.selective_scan.spec import ScanSpec
from llm_jax.kernels.tiles import tiles

LANES, SUBLANES = 128, 8
STATES_BYTES = 16 * 2**20
"""Most that the states of a chunk's tokens may take of the VMEM."""


@dataclass(frozen=True)
class Tiles:
    """Sizes that may be tuned."""

    chunk: int = 128
    """Tokens of a chunk, unless the call says it."""
    lanes: int = 512
    """Most channels of a tile."""


@dataclass(frozen=True)
class Layout:
    """How a call is cut."""

    chunk: int
    chunks: int
    lanes: int
    """Channels of a tile."""
    tiles: int
    states: int
    """Padded to whole sublanes."""


def supports(spec: ScanSpec, platform: str) -> str | None:
    """TPUs; u in float32 or bfloat16; as long as the states of a chunk fit in the VMEM."""
    refusal = tpu_refusal(platform)
    if refusal is not None:
        return refusal
    if spec.dtype == "float16":
        return "TPUs hold bfloat16 and float32, not float16"
    if spec.length == 1:
        return "a single token is no scan"
    if spec.chunk_size is not None and spec.chunk_size % LANES:
        return f"chunks of whole multiples of {LANES} tokens, not of {spec.chunk_size}"
    cut = layout(spec, Tiles())
    size = 4 * cut.chunk * cut.states * cut.lanes
    if size > STATES_BYTES:
        return f"the states of a chunk take {size >> 20} MiB, more than the {STATES_BYTES >> 20} of VMEM set aside"
    return None


def layout(spec: ScanSpec, sizes: Tiles) -> Layout:
    """Channels in tiles of one size."""
    chunk = spec.chunk_size or sizes.chunk
    states = SUBLANES * math.ceil(spec.states / SUBLANES)
    blocks = math.ceil(spec.channels / LANES)
    most = min(sizes.lanes, STATES_BYTES // (4 * chunk * states)) // LANES
    per_tile = max([n for n in range(1, most + 1) if blocks % n == 0], default=1)
    return Layout(chunk, math.ceil(spec.length / chunk), per_tile * LANES, blocks // per_tile, states)


def forward(
    spec: ScanSpec,
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    skip: Float[Array, " D"],
    starts: Bool[Array, "B T"] | None,
    initial_state: Float[Array, "B D N"],
    *,
    keep_states: bool,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"], Float[Array, "B chunks N d"] | None]:
    """Output in u's dtype, float32 final state, and if asked for the states before each chunk."""
    from llm_jax.kernels.selective_scan import tpu_forward  # imports Pallas

    cut = _cut(spec)
    y, final, states = tpu_forward.run(
        spec,
        cut,
        _tokens(cut, u),
        _tokens(cut, delta.astype(jnp.float32)),
        _rates(cut, A),
        _rows(cut, B, C, starts),
        _per_channel(cut, skip),
        _states(cut, initial_state),
        keep_states=keep_states,
    )
    return y[:, : spec.length, : spec.channels], _of_states(spec, final), states


def backward(
    spec: ScanSpec,
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    skip: Float[Array, " D"],
    starts: Bool[Array, "B T"] | None,
    states: Float[Array, "B chunks N d"],
    d_out: Float[Array, "B T D"],
    d_final: Float[Array, "B D N"],
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Gradients of u, delta, A, B, C, skip and the initial state."""
    from llm_jax.kernels.selective_scan import tpu_backward  # imports Pallas

    cut = _cut(spec)
    du, d_delta, d_rates, d_rows, d_skip, d_initial = tpu_backward.run(
        spec,
        cut,
        _tokens(cut, u),
        _tokens(cut, delta.astype(jnp.float32)),
        _rates(cut, A),
        _rows(cut, B, C, starts),
        _per_channel(cut, skip),
        states,
        _tokens(cut, d_out),
        _states(cut, d_final),
    )
    dB, dC = jnp.split(jnp.swapaxes(jnp.sum(d_rows, axis=1), 1, 2)[:, : spec.length], 2, axis=2)
    return (
        du[:, : spec.length, : spec.channels],
        d_delta[:, : spec.length, : spec.channels].astype(delta.dtype),
        jnp.sum(_of_states(spec, d_rates), axis=0).astype(A.dtype),
        dB[:, :, : spec.states].astype(B.dtype),
        dC[:, :, : spec.states].astype(C.dtype),
        jnp.sum(d_skip, axis=(0, 1))[: spec.channels].astype(skip.dtype),
        _of_states(spec, d_initial),
    )


def _cut(spec: ScanSpec) -> Layout:
    return layout(spec, tiles("selective_scan", "tpu", dtype=spec.dtype, shape=f"N{spec.states}", default=Tiles()))


def _padded(x: Array, *sizes: int) -> Array:
    """Zeros behind each axis up to these sizes."""
    pads = [(0, size - had) for had, size in zip(x.shape, sizes)]
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def _tokens(cut: Layout, x: Float[Array, "B T D"]) -> Float[Array, "B t d"]:
    """Tokens beyond the end have delta 0: they leave the state as it is."""
    return _padded(x, x.shape[0], cut.chunks * cut.chunk, cut.tiles * cut.lanes)


def _rates(cut: Layout, A: Float[Array, "D N"]) -> Float[Array, "N d"]:
    return _padded(A.astype(jnp.float32).T, cut.states, cut.tiles * cut.lanes)


def _rows(
    cut: Layout, B: Float[Array, "B T N"], C: Float[Array, "B T N"], starts: Bool[Array, "B T"] | None
) -> Float[Array, "B rows t"]:
    """Tokens along lanes: B, C and, with documents, whether a token begins one (in whole sublanes)."""
    length = cut.chunks * cut.chunk
    rows = [_padded(jnp.swapaxes(x.astype(jnp.float32), 1, 2), x.shape[0], cut.states, length) for x in (B, C)]
    if starts is not None:
        begins = _padded(starts.astype(jnp.float32), starts.shape[0], length)
        rows.append(jnp.broadcast_to(begins[:, None], (begins.shape[0], SUBLANES, length)))
    return jnp.concatenate(rows, axis=1)


def _per_channel(cut: Layout, x: Float[Array, " D"]) -> Float[Array, "1 d"]:
    return _padded(x.astype(jnp.float32), cut.tiles * cut.lanes)[None]


def _states(cut: Layout, x: Float[Array, "B D N"]) -> Float[Array, "B N d"]:
    return _padded(jnp.swapaxes(x, 1, 2), x.shape[0], cut.states, cut.tiles * cut.lanes)


def _of_states(spec: ScanSpec, x: Float[Array, "B N d"]) -> Float[Array, "B D N"]:
    return jnp.swapaxes(x[:, : spec.states, : spec.channels], 1, 2)
