"""Chunks of tokens: products of matrices within one, a recurrence of states from one to the next.

The forward pass keeps the state before each chunk; the backward pass makes the rest of one chunk at a time again.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels import manual_axes
from llm_jax.kernels.platform import target_platform
from llm_jax.kernels.ssd.decay import decay, exponent_gradient, remaining, where_any
from llm_jax.kernels.ssd.spec import SsdSpec

CHUNK = {"cpu": 64, "gpu": 128, "tpu": 128}
"""Tokens of a chunk. At most 256: see `decay`."""


def supports(spec: SsdSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


class _Chunk(NamedTuple):
    """Arrays of a chunk, or of all of them with `chunks` in front."""

    x: Float[Array, "B G R Q P"]
    dt: Float[Array, "B G R Q"]
    b: Float[Array, "B G Q N"]
    c: Float[Array, "B G Q N"]
    starts: Bool[Array, "B Q"] | None


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
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"], Float[Array, "chunks B G R P N"] | None]:
    """Output in x's dtype, float32 final state, and if asked for the states before each chunk."""
    rates, skip = _per_head(spec, A), _per_head(spec, skip)
    state = initial_state.reshape(spec.batch, spec.groups, spec.per_group, spec.head_dim, spec.states)
    if spec.length == 1:
        y, final = _token(spec, x, dt, rates, B, C, skip, state)
        return y, final.reshape(initial_state.shape), state[None] if keep_states else None

    def chunk(state: Array, at: _Chunk) -> tuple[Array, tuple[Array, Array]]:
        left = decay(at.dt, rates, at.starts)
        x32, inputs = _inputs(at)
        # Step sizes go with the weights: x is then a factor as it came, not rounded once more.
        weights = _dot("bgtn,bgsn->bgts", at.c, at.b)[:, :, None] * (left.between * at.dt[..., None, :])
        y = _dot("bgrts,bgrsp->bgrtp", weights.astype(x.dtype), at.x)
        y += remaining(left.since[..., None], _dot("bgtn,bgrpn->bgrtp", at.c, state.astype(x.dtype)))
        y += skip[..., None, None] * x32
        arriving = (left.until[..., None] * inputs).astype(x.dtype)
        end = remaining(left.since[..., -1, None, None], state) + _dot("bgrsp,bgsn->bgrpn", arriving, at.b)
        return end, (state, y.astype(x.dtype))

    final, (states, y) = _over_chunks(chunk, state, _chunks(spec, x, dt, B, C, starts))
    return _of_heads(spec, y), final.reshape(initial_state.shape), states if keep_states else None


def backward(
    spec: SsdSpec,
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    skip: Float[Array, " H"],
    starts: Bool[Array, "B T"] | None,
    states: Float[Array, "chunks B G R P N"],
    d_out: Float[Array, "B T H P"],
    d_final: Float[Array, "B H P N"],
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Gradients of x, dt, A, B, C, skip and the initial state."""
    rates, skip32 = _per_head(spec, A), _per_head(spec, skip)

    def chunk(carry: tuple[Array, Array, Array], xs: tuple[_Chunk, Array, Array]) -> tuple[Any, Any]:
        d_end, d_rates, d_skip = carry
        at, dy, state = xs
        left = decay(at.dt, rates, at.starts)
        x32, inputs32 = _inputs(at)
        d_end_low = d_end.astype(x.dtype)
        products = _dot("bgtn,bgsn->bgts", at.c, at.b)[:, :, None]

        # Within the chunk: y = (products * between) inputs.
        d_weights = _dot("bgrtp,bgrsp->bgrts", dy, at.x) * (left.between * at.dt[..., None, :])
        d_products = jnp.sum(d_weights, axis=2).astype(x.dtype)
        weights = (products * left.between).astype(x.dtype)
        d_pairs = d_weights * products
        d_inputs = _dot("bgrts,bgrtp->bgrsp", weights, dy)

        # From the state before: y += since (c state). To the state after: until inputs b, and what is left of before.
        since_dy32 = left.since[..., None] * dy.astype(jnp.float32)
        since_dy = since_dy32.astype(x.dtype)
        from_state = _dot("bgtn,bgrpn->bgrtp", at.c, state.astype(x.dtype))
        d_since = remaining(left.since, jnp.sum(dy.astype(jnp.float32) * from_state, axis=-1))
        to_inputs = remaining(left.until[..., None], _dot("bgrpn,bgsn->bgrsp", d_end_low, at.b))
        d_until = jnp.sum(to_inputs * inputs32, axis=-1)
        last = left.since[..., -1]
        d_last = remaining(last, jnp.sum(d_end * state, axis=(-2, -1)))
        d_exponent = exponent_gradient(d_pairs, d_since, d_until, d_last, left.seen, at.starts, _precision(x))
        d_inputs += to_inputs

        of_state = _dot("bgrtp,bgrpn->bgtn", since_dy, state.astype(x.dtype))
        dc = _dot("bgts,bgsn->bgtn", d_products, at.b) + where_any(left.since, of_state)
        arriving = (left.until[..., None] * inputs32).astype(x.dtype)
        of_end = _dot("bgrsp,bgrpn->bgsn", arriving, d_end_low)
        db = _dot("bgts,bgtn->bgsn", d_products, at.c) + where_any(left.until, of_end)
        d_dt = rates[:, :, None] * d_exponent + jnp.sum(x32 * d_inputs, axis=-1)
        dy32 = dy.astype(jnp.float32)
        dx = at.dt[..., None] * d_inputs + skip32[..., None, None] * dy32
        d_before = last[..., None, None] * d_end + _dot("bgrtp,bgtn->bgrpn", since_dy, at.c)
        d_rates += jnp.sum(d_exponent * at.dt, axis=(0, 3))
        d_skip += jnp.sum(x32 * dy32, axis=(0, 3, 4))
        made = dx.astype(x.dtype), d_dt.astype(dt.dtype), db.astype(x.dtype), dc.astype(x.dtype)
        return (d_before, d_rates, d_skip), made

    zero = manual_axes.full(rates.shape, 0.0, (x, d_out))
    start = d_final.reshape(states.shape[1:]), zero, zero
    xs = _chunks(spec, x, dt, B, C, starts), _cut_heads(spec, d_out), states
    (d_state, d_rates, d_skip), (dx, d_dt, db, dc) = _over_chunks(chunk, start, xs, reverse=True)
    return (
        _of_heads(spec, dx),
        _of_heads(spec, d_dt),
        d_rates.reshape(A.shape).astype(A.dtype),
        _of_groups(spec, db),
        _of_groups(spec, dc),
        d_skip.reshape(skip.shape).astype(skip.dtype),
        d_state.reshape(d_final.shape),
    )


def _token(
    spec: SsdSpec, x: Array, dt: Array, rates: Array, B: Array, C: Array, skip: Array, state: Float[Array, "B G R P N"]
) -> tuple[Float[Array, "B 1 H P"], Float[Array, "B G R P N"]]:
    """A step of decoding, which begins no document. The output is made of the state after the token: then the state is
    read and written once, in one fusion; made of the one before it, GPUs read it twice."""
    x32, b, c = (y[:, 0].astype(jnp.float32) for y in (x, B, C))
    dt = dt.astype(jnp.float32).reshape(state.shape[:3])
    x32 = x32.reshape(state.shape[:4])
    arriving = (dt[..., None] * x32)[..., None] * b[:, :, None, None]
    state = jnp.exp(dt * rates)[..., None, None] * state + arriving
    y = jnp.sum(state * c[:, :, None, None], axis=-1) + skip[..., None] * x32
    return y.astype(x.dtype).reshape(x.shape), state


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _precision(x: Array) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _inputs(at: _Chunk) -> tuple[Array, Array]:
    """x and dt x in float32."""
    x32 = at.x.astype(jnp.float32)
    return x32, at.dt[..., None] * x32


def _over_chunks(chunk: Any, carry: Any, xs: Any, reverse: bool = False) -> tuple[Any, Any]:
    """`lax.scan`; a single chunk without a loop."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(chunk, carry, xs, reverse=reverse)
    carry, made = chunk(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], made)


def _per_head(spec: SsdSpec, x: Array) -> Float[Array, "G R"]:
    return x.astype(jnp.float32).reshape(spec.groups, spec.per_group)


def _chunks(spec: SsdSpec, x: Array, dt: Array, B: Array, C: Array, starts: Array | None) -> _Chunk:
    b, c = (jnp.moveaxis(_cut(spec, y), 3, 2) for y in (B, C))
    begins = None if starts is None else _cut(spec, starts)
    return _Chunk(_cut_heads(spec, x), _cut_heads(spec, dt.astype(jnp.float32)), b, c, begins)


def _cut(spec: SsdSpec, x: Array) -> Array:
    """[B, T, ...] -> [chunks, B, Q, ...]. Tokens beyond the end have dt 0: they leave the state as it is."""
    size = min(spec.chunk_size or CHUNK[target_platform()], spec.length)
    count = math.ceil(spec.length / size)
    x = jnp.pad(x, ((0, 0), (0, count * size - spec.length), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _cut_heads(spec: SsdSpec, x: Array) -> Array:
    """[B, T, H, ...] -> [chunks, B, G, R, Q, ...]."""
    x = _cut(spec, x)
    x = x.reshape(*x.shape[:3], spec.groups, spec.per_group, *x.shape[4:])
    return jnp.moveaxis(x, 2, 4)


def _of_heads(spec: SsdSpec, x: Array) -> Array:
    """[chunks, B, G, R, Q, ...] -> [B, T, H, ...]."""
    x = jnp.moveaxis(x, (0, 4), (1, 2))
    return x.reshape(spec.batch, -1, spec.heads, *x.shape[5:])[:, : spec.length]


def _of_groups(spec: SsdSpec, x: Array) -> Array:
    """[chunks, B, G, Q, N] -> [B, T, G, N]."""
    x = jnp.moveaxis(x, (0, 3), (1, 2))
    return x.reshape(spec.batch, -1, *x.shape[3:])[:, : spec.length]
