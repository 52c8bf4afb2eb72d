"""Token by token on Hopper GPUs: a thread per channel with its state in registers, chunks of tokens brought by TMA.

The forward pass keeps the state before each chunk; the backward pass makes the states of four tokens at a time again.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.platform import hopper_refusal
from llm_jax.kernels.selective_scan.spec import ScanSpec
from llm_jax.kernels.tiles import tiles

GROUP = 4
"""Tokens whose states are made again at a time."""
LANES, STATES = 128, 16
"""Channels of a block of threads; states of a channel, padded."""
LONGEST = 32
"""Tokens of a chunk that shared memory has room for, in the backward pass and float32."""


@dataclass(frozen=True)
class Tiles:
    """Sizes that may be tuned."""

    chunk: int = 32
    """Tokens between two states that are kept, unless the call says it; a multiple of GROUP. Shorter ones take more
    memory for states, and less shared memory: at 8, a processor has two blocks of threads in the backward pass."""


@dataclass(frozen=True)
class Layout:
    """How a call is cut."""

    batch: int
    chunk: int
    chunks: int
    tiles: int
    """Of 128 channels."""

    @property
    def length(self) -> int:
        """Of whole chunks."""
        return self.chunks * self.chunk

    @property
    def channels(self) -> int:
        """Of whole tiles."""
        return self.tiles * LANES


def supports(spec: ScanSpec, platform: str) -> str | None:
    """Hopper; at most 16 states."""
    refusal = hopper_refusal(platform)
    if refusal is not None:
        return refusal
    if spec.length == 1:
        return "a single token is no scan"
    if spec.states > STATES:
        return f"at most {STATES} states, not {spec.states}"
    if spec.chunk_size is not None and (spec.chunk_size % GROUP or spec.chunk_size > LONGEST):
        return f"chunks of a multiple of {GROUP} tokens, at most {LONGEST}, not of {spec.chunk_size}"
    return None


def layout(spec: ScanSpec) -> Layout:
    """Of a call."""
    sizes = tiles("selective_scan", "gpu", dtype=spec.dtype, shape=f"N{spec.states}", default=Tiles())
    chunk = spec.chunk_size or sizes.chunk
    return Layout(spec.batch, chunk, math.ceil(spec.length / chunk), math.ceil(spec.channels / LANES))


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
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"], Float[Array, "B chunks 16 d"] | None]:
    """Output in u's dtype, float32 final state, and if asked for the states before each chunk."""
    from llm_jax.kernels.selective_scan import gpu_forward  # imports Pallas

    cut = layout(spec)
    y, final, states = gpu_forward.run(
        cut,
        _tokens(cut, u),
        _tokens(cut, delta.astype(jnp.float32)),
        _rates(cut, A),
        _selected(cut, B, C),
        _starts(cut, starts),
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
    states: Float[Array, "B chunks 16 d"],
    d_out: Float[Array, "B T D"],
    d_final: Float[Array, "B D N"],
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Gradients of u, delta, A, B, C, skip and the initial state."""
    from llm_jax.kernels.selective_scan import gpu_backward  # imports Pallas

    cut = layout(spec)
    du, d_delta, d_rates, d_selected, d_skip, d_initial = gpu_backward.run(
        cut,
        _tokens(cut, u),
        _tokens(cut, delta.astype(jnp.float32)),
        _rates(cut, A),
        _selected(cut, B, C),
        _starts(cut, starts),
        _per_channel(cut, skip),
        states,
        _tokens(cut, d_out),
        _states(cut, d_final),
    )
    d_selected = jnp.sum(d_selected, axis=1).reshape(spec.batch, 2, cut.length, STATES)
    dB, dC = d_selected[:, 0, : spec.length, : spec.states], d_selected[:, 1, : spec.length, : spec.states]
    return (
        du[:, : spec.length, : spec.channels],
        d_delta[:, : spec.length, : spec.channels].astype(delta.dtype),
        jnp.sum(_of_states(spec, d_rates), axis=0).astype(A.dtype),
        dB.astype(B.dtype),
        dC.astype(C.dtype),
        jnp.sum(d_skip, axis=0)[: spec.channels].astype(skip.dtype),
        _of_states(spec, d_initial),
    )


def _padded(x: Array, *sizes: int) -> Array:
    """Zeros behind each axis up to these sizes."""
    pads = [(0, size - had) for had, size in zip(x.shape, sizes, strict=True)]
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def _tokens(cut: Layout, x: Float[Array, "B T D"]) -> Float[Array, "B t d"]:
    """Tokens beyond the end have delta 0: they leave the state as it is."""
    return _padded(x, cut.batch, cut.length, cut.channels)


def _rates(cut: Layout, A: Float[Array, "D N"]) -> Float[Array, "16 d"]:
    return _padded(A.astype(jnp.float32).T, STATES, cut.channels)


def _selected(cut: Layout, B: Float[Array, "B T N"], C: Float[Array, "B T N"]) -> Float[Array, "B t 32"]:
    """B and C of a token side by side."""
    padded = [_padded(x.astype(jnp.float32), cut.batch, cut.length, STATES) for x in (B, C)]
    return jnp.concatenate(padded, axis=2)


def _starts(cut: Layout, starts: Bool[Array, "B T"] | None) -> Float[Array, "B t"] | None:
    return None if starts is None else _padded(starts.astype(jnp.float32), cut.batch, cut.length)


def _per_channel(cut: Layout, x: Float[Array, " D"]) -> Float[Array, " d"]:
    return _padded(x.astype(jnp.float32), cut.channels)


def _states(cut: Layout, x: Float[Array, "B D N"]) -> Float[Array, "B 16 d"]:
    return _padded(jnp.swapaxes(x, 1, 2), cut.batch, STATES, cut.channels)


def _of_states(spec: ScanSpec, x: Float[Array, "B 16 d"]) -> Float[Array, "B D N"]:
    return jnp.swapaxes(x[:, : spec.states, : spec.channels], 1, 2)
