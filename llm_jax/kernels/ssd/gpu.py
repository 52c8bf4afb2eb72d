"""Chunks of 128 tokens on Hopper GPUs: wgmma for products within a chunk, the state in registers from one to the next.

A head of more than 64 channels is two or more heads that share their step sizes. Running sums of the exponents are
made before the kernels; sums over the heads of a group that are whole products of matrices are XLA's.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.platform import hopper_refusal
from llm_jax.kernels.ssd.decay import remaining, sums, where_any
from llm_jax.kernels.ssd.spec import SsdSpec
from llm_jax.kernels.tiles import tiles

CHUNK, HALF = 128, 64
"""Tokens of a chunk; a warpgroup has half of them."""
HEAD_DIM, STATES = 64, 128
"""Of a head as the kernels see it."""


@dataclass(frozen=True)
class Tiles:
    """Of the backward pass: most heads that a block of threads takes one after another. More of them read B and C
    less often, fewer occupy the processors better."""

    heads: int = 8
    product_heads: int = 16
    """In the kernel of B Cᵀ's gradient, whose sums over a block's heads are added up outside."""


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

    def heads_of_block(self, most: int) -> int:
        """As many heads of one group as divide it, at most so many."""
        return max(n for n in range(1, most + 1) if self.per_group % n == 0)


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


def backward(
    spec: SsdSpec,
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    skip: Float[Array, " H"],
    starts: Bool[Array, "B T"] | None,
    states: Float[Array, "B h chunks 128 64"],
    d_out: Float[Array, "B T H P"],
    d_final: Float[Array, "B H P N"],
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Gradients of x, dt, A, B, C, skip and the initial state."""
    from llm_jax.kernels.ssd import gpu_backward, gpu_products, gpu_states  # they import Pallas

    cut = layout(spec)
    shape = f"H{spec.heads} P{spec.head_dim} G{spec.groups}"
    sizes = tiles("ssd", "gpu", dtype=spec.dtype, shape=shape, default=Tiles())
    x, dy, B_, C_ = _tokens(cut, x), _tokens(cut, d_out), _groups(cut, B), _groups(cut, C)
    rows, run = _rows(spec, cut, dt, A, starts)
    skips = jnp.repeat(skip.astype(jnp.float32), cut.parts)
    d_states, kept, d_initial = gpu_states.run(cut, rows, run, C_, states, dy, _states(cut, d_final))
    dx, d_rows = gpu_backward.run(cut, sizes.heads, x, rows, run, B_, C_, skips, states, d_states, dy)
    d_products = gpu_products.run(cut, sizes.product_heads, x, rows, run, dy)

    since, until = _decays(cut, rows, run)
    passed = remaining(since[..., -1], jnp.sum(kept, axis=-1))
    d_exponent = d_rows[0].reshape(since.shape) + passed[..., None]
    weighted = d_rows[3].reshape(since.shape).sum(-1) + passed * rows[1].reshape(since.shape)[..., -1]
    weighted = weighted.reshape(spec.batch, spec.heads, -1).sum((0, 2))
    d_exponent, d_scale, d_skip = (
        jnp.sum(y.reshape(spec.batch, spec.heads, cut.parts, cut.length), axis=2) for y in (d_exponent, *d_rows[1:3])
    )
    d_exponent = jnp.swapaxes(d_exponent, 1, 2)[:, : spec.length]
    if starts is not None:
        d_exponent = jnp.where(starts[..., None], 0.0, d_exponent)
    d_scale = jnp.swapaxes(d_scale, 1, 2)[:, : spec.length]
    dB, dC = _group_gradients(cut, x, dy, rows[0], since, until, B_, C_, states, d_states, d_products)
    return (
        _of_tokens(spec, dx),
        (A.astype(jnp.float32) * d_exponent + d_scale).astype(dt.dtype),
        _decay_gradient(A, weighted, d_exponent, dt).astype(A.dtype),
        dB[:, : spec.length, :, : spec.states],
        dC[:, : spec.length, :, : spec.states],
        jnp.sum(d_skip, axis=(0, 2)).astype(skip.dtype),
        _of_states(spec, cut, d_initial),
    )


def _decay_gradient(
    A: Float[Array, " H"], weighted: Float[Array, " H"], d_exponent: Float[Array, "B T H"], dt: Float[Array, "B T H"]
) -> Float[Array, " H"]:
    """Of A: the sum of dt times the exponents' gradients. As `weighted`, A times it, which is not made of rounded
    pairs; but for an A of 0."""
    plain = jnp.sum(d_exponent * dt.astype(jnp.float32), axis=(0, 1))
    A = A.astype(jnp.float32)
    return jnp.where(A == 0, plain, weighted / jnp.where(A == 0, 1.0, A))


def _decays(cut: Layout, rows: Array, run: Array | None) -> tuple[Array, Array]:
    """[B, h, chunks, 128]: what is left at a token of the state before its chunk, and after the chunk of a token."""
    since = rows[1].reshape(cut.batch, cut.heads, cut.chunks, CHUNK)
    until = since[..., -1:] - since
    if run is not None:
        run = run.reshape(cut.batch, 1, cut.chunks, CHUNK)
        since = jnp.where(run == 0, since, -jnp.inf)
        until = jnp.where(run == run[..., -1:], until, -jnp.inf)
    return jnp.exp(since), jnp.exp(until)


def _group_gradients(
    cut: Layout,
    x: Float[Array, "B t h 64"],
    dy: Float[Array, "B t h 64"],
    dt: Float[Array, "B h t"],
    since: Float[Array, "B h chunks 128"],
    until: Float[Array, "B h chunks 128"],
    B: Float[Array, "B t G 128"],
    C: Float[Array, "B t G 128"],
    states: Float[Array, "B h chunks 128 64"],
    d_states: Float[Array, "B h chunks 128 64"],
    d_products: Float[Array, "B chunks blocks 128 128"],
) -> tuple[Float[Array, "B t G 128"], Float[Array, "B t G 128"]]:
    """Of B and C: sums over the heads of a group."""

    def of_states(x: Array, left: Array, states: Array) -> Array:
        x = jnp.moveaxis(x.reshape(cut.batch, cut.chunks, CHUNK, cut.groups, cut.per_group, HEAD_DIM), 2, 4)
        left = jnp.moveaxis(left.reshape(cut.batch, cut.groups, cut.per_group, cut.chunks, CHUNK), 3, 1)
        x = (left[..., None] * x.astype(jnp.float32)).astype(x.dtype)
        states = states.reshape(cut.batch, cut.groups, cut.per_group, cut.chunks, STATES, HEAD_DIM)
        made = jnp.einsum("bcgrqp,bgrcnp->bcgqn", x, states, preferred_element_type=jnp.float32)
        return jnp.swapaxes(where_any(left, made), 2, 3)

    def pairs(equation: str, y: Array) -> Array:
        y = y.reshape(cut.batch, cut.chunks, CHUNK, cut.groups, STATES)
        return jnp.einsum(equation, products, y, preferred_element_type=jnp.float32)

    products = jnp.sum(d_products.reshape(cut.batch, cut.chunks, cut.groups, -1, CHUNK, CHUNK), axis=3).astype(x.dtype)
    dB = of_states(x, until * dt.reshape(until.shape), d_states) + pairs("bcgst,bctgn->bcsgn", C)
    dC = of_states(dy, since, states) + pairs("bcgst,bcsgn->bctgn", B)
    return dB.astype(B.dtype).reshape(B.shape), dC.astype(C.dtype).reshape(C.shape)


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
    """Per token and head [2, B, h, t]: dt and the running sum of the exponents, in one part: 128 exponents of -100 are
    rounded by 5e-4, less than the factors of products in 16 bits. Per token [B, t]: documents that began in its chunk.
    """
    dt = _padded(dt.astype(jnp.float32), axis_1=cut.length)
    cut_dt = jnp.moveaxis(dt.reshape(spec.batch * cut.chunks, CHUNK, spec.groups, spec.per_group), 1, 3)
    cut_starts = None if starts is None else _padded(starts, axis_1=cut.length).reshape(-1, CHUNK)
    made = sums(cut_dt, A.astype(jnp.float32).reshape(spec.groups, spec.per_group), cut_starts)
    rows = jnp.stack([cut_dt, made.coarse + made.fine]).reshape(2, spec.batch, cut.chunks, spec.heads, CHUNK)
    rows = jnp.moveaxis(rows, 2, 3).reshape(2, spec.batch, spec.heads, cut.length)
    run = None if made.run is None else made.run.reshape(spec.batch, cut.length)
    return jnp.repeat(rows, cut.parts, axis=2), run
