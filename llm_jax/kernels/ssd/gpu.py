"""Chunks of 128 tokens on Hopper GPUs: wgmma for the products within a chunk, the state in registers from one to the next.

A head of more than 64 channels is two or more heads that share their step sizes. Running sums of the exponents are
made before the kernels; sums over the heads of a group that are whole products of matrices are XLA's.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.platform import hopper_refusal
from llm_jax.kernels.ssd.decay import sums
from llm_jax.kernels.ssd.spec import SsdSpec

CHUNK, HALF = 128, 64
"""Tokens of a chunk; a warpgroup has half of them."""
HEAD_DIM, STATES = 64, 128
"""Of a head as the kernels see it."""


@dataclass(frozen=True)
class Layout:
    """How a call is cut."""

    batch: int
    chunks: int
    parts: int
    """Heads that the kernels see, per head of the call."""
    heads: int
    """As the kernels see them."""
    groups: int

    @property
    def per_group(self) -> int:
        """Heads that share B and C."""
        return self.heads // self.groups

    @property
    def length(self) -> int:
        """Of whole chunks."""
        return self.chunks * CHUNK


def supports(spec: SsdSpec, platform: str) -> str | None:
    """Hopper; bfloat16 and float16; at most 128 states."""
    refusal = hopper_refusal(platform)
    if refusal is not None:
        return refusal
    if spec.dtype == "float32":
        return "tensor cores take bfloat16 and float16, not float32"
    if spec.length == 1:
        return "a single token is no chunk"
    if spec.states > STATES:
        return f"at most {STATES} states, not {spec.states}"
    if spec.chunk_size not in (None, CHUNK):
        return f"chunks of {CHUNK} tokens, not of {spec.chunk_size}"
    return None


def layout(spec: SsdSpec) -> Layout:
    """Of a call."""
    parts = math.ceil(spec.head_dim / HEAD_DIM)
    return Layout(spec.batch, math.ceil(spec.length / CHUNK), parts, spec.heads * parts, spec.groups)


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
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"], Float[Array, "B h chunks 128 64"] | None]:
    """Output in x's dtype, float32 final state, and if asked for the states before each chunk in x's dtype."""
    from llm_jax.kernels.ssd import gpu_forward  # imports Pallas

    cut = layout(spec)
    y, final, states = gpu_forward.run(
        cut,
        _tokens(cut, x),
        *_rows(spec, cut, dt, A, starts),
        _groups(cut, B),
        _groups(cut, C),
        jnp.repeat(skip.astype(jnp.float32), cut.parts),
        _states(cut, initial_state),
        keep_states=keep_states,
    )
    return _of_tokens(spec, y), _of_states(spec, cut, final), states


def _padded(x: Array, **sizes: int) -> Array:
    """Zeros behind axis i up to size `axis_i`."""
    pads = [(0, sizes.get(f"axis_{i}", size) - size) for i, size in enumerate(x.shape)]
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def _tokens(cut: Layout, x: Float[Array, "B T H P"]) -> Float[Array, "B t h 64"]:
    """Tokens beyond the end have dt 0: they leave the state as it is."""
    x = _padded(x, axis_1=cut.length, axis_3=cut.parts * HEAD_DIM)
    return x.reshape(*x.shape[:2], cut.heads, HEAD_DIM)


def _of_tokens(spec: SsdSpec, x: Float[Array, "B t h 64"]) -> Float[Array, "B T H P"]:
    return x.reshape(*x.shape[:2], spec.heads, -1)[:, : spec.length, :, : spec.head_dim]


def _groups(cut: Layout, x: Float[Array, "B T G N"]) -> Float[Array, "B t G 128"]:
    return _padded(x, axis_1=cut.length, axis_3=STATES)


def _states(cut: Layout, x: Float[Array, "B H P N"]) -> Float[Array, "B h 128 64"]:
    x = _padded(x, axis_2=cut.parts * HEAD_DIM, axis_3=STATES)
    return jnp.swapaxes(x.reshape(x.shape[0], cut.heads, HEAD_DIM, STATES), 2, 3)


def _of_states(spec: SsdSpec, cut: Layout, x: Float[Array, "B h 128 64"]) -> Float[Array, "B H P N"]:
    x = jnp.swapaxes(x, 2, 3).reshape(spec.batch, spec.heads, cut.parts * HEAD_DIM, STATES)
    return x[:, :, : spec.head_dim, : spec.states]


def _rows(spec: SsdSpec, cut: Layout, dt: Array, A: Array, starts: Array | None) -> tuple[Array, Array | None]:
    """Per token and head [3, B, h, t]: dt, running sums of the exponents, coarse and fine. Per token [B, t]: documents
    that began in its chunk."""
    dt = _padded(dt.astype(jnp.float32), axis_1=cut.length)
    cut_dt = jnp.moveaxis(dt.reshape(spec.batch * cut.chunks, CHUNK, spec.groups, spec.per_group), 1, 3)
    cut_starts = None if starts is None else _padded(starts, axis_1=cut.length).reshape(-1, CHUNK)
    made = sums(cut_dt, A.astype(jnp.float32).reshape(spec.groups, spec.per_group), cut_starts)
    rows = jnp.stack([cut_dt, made.coarse, made.fine]).reshape(3, spec.batch, cut.chunks, spec.heads, CHUNK)
    rows = jnp.moveaxis(rows, 2, 3).reshape(3, spec.batch, spec.heads, cut.length)
    run = None if made.run is None else made.run.reshape(spec.batch, cut.length)
    return jnp.repeat(rows, cut.parts, axis=2), run
