"""The recurrence in chunks of tokens. The forward pass keeps the state before each chunk; the backward pass makes the
states of one chunk at a time again. States lie as [B, N, D], the long axis last: sums over N are then sums of vectors.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llm_jax.kernels import manual_axes
from llm_jax.kernels.selective_scan.spec import ScanSpec

CHUNK = 64
"""Tokens of a chunk: the backward pass holds so many states, the forward pass leaves one in so many."""
UNROLL = 4
"""Tokens of a turn of the forward loop. The backward one gets slower by it: XLA makes again what turns share."""


def supports(spec: ScanSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


class _Token(NamedTuple):
    """Arrays of a token, of a chunk [Q, ...], or of all chunks [chunks, Q, ...]; float32 once a chunk is taken up."""

    u: Float[Array, "B D"]
    delta: Float[Array, "B D"]
    b: Float[Array, "B N"]
    c: Float[Array, "B N"]
    start: Bool[Array, " B"] | None


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
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"], Float[Array, "chunks B N D"] | None]:
    """Output in u's dtype, float32 final state, and if asked for the states before each chunk."""
    if spec.length == 1:
        y, final = _single(u, delta, A, B, C, skip, initial_state)
        return y, final, jnp.swapaxes(initial_state, 1, 2)[None] if keep_states else None
    rates, skip = A.astype(jnp.float32).T, skip.astype(jnp.float32)

    def token(state: Array, x: _Token) -> tuple[Array, Array]:
        state = _step(rates, state, x)
        return state, jnp.sum(state * x.c[:, :, None], axis=1) + skip * x.u

    def chunk(state: Array, x: _Token) -> tuple[Array, tuple[Array, Array]]:
        end, y = jax.lax.scan(token, state, _wide(x), unroll=UNROLL)
        return end, (state, y.astype(u.dtype))

    state = jnp.swapaxes(initial_state, 1, 2)
    final, (states, y) = jax.lax.scan(chunk, state, _chunks(spec, u, delta, B, C, starts))
    return _whole(spec, y), jnp.swapaxes(final, 1, 2), states if keep_states else None


def backward(
    spec: ScanSpec,
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    skip: Float[Array, " D"],
    starts: Bool[Array, "B T"] | None,
    states: Float[Array, "chunks B N D"],
    d_out: Float[Array, "B T D"],
    d_final: Float[Array, "B D N"],
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Gradients of u, delta, A, B, C, skip and the initial state.

    With g[t] that of the state after token t: g[t] = C[t] dy[t] + exp(delta[t+1] A) g[t+1], nothing across a start.
    """
    rates, skip32 = A.astype(jnp.float32).T, skip.astype(jnp.float32)

    def before(state: Array, x: _Token) -> tuple[Array, Array]:
        return _step(rates, state, x), state

    def token(carry: tuple[Array, Array], xs: tuple[_Token, Array, Array]) -> tuple[Any, Any]:
        g, d_rates = carry
        x, dy, state = xs
        state = _kept(state, x)
        decay = jnp.exp(x.delta[:, None] * rates)
        new = decay * state + (x.delta * x.u)[:, None] * x.b[:, :, None]
        g += dy[:, None] * x.c[:, :, None]
        d_exponent = g * state * decay
        d_input = jnp.sum(g * x.b[:, :, None], axis=1)
        made = (
            x.delta * d_input + skip32 * dy,
            x.u * d_input + jnp.sum(d_exponent * rates, axis=1),
            _along_channels(g, x.delta * x.u),
            _along_channels(new, dy),
        )
        return (_kept(g * decay, x), d_rates + jnp.sum(d_exponent * x.delta[:, None], axis=0)), made

    def chunk(carry: tuple[Array, Array], xs: tuple[_Token, Array, Array]) -> tuple[Any, Any]:
        x, dy, state = xs
        x = _wide(x)
        _, held = jax.lax.scan(before, state, x)
        carry, made = jax.lax.scan(token, carry, (x, dy.astype(jnp.float32), held), reverse=True)
        return carry, tuple(d.astype(like.dtype) for d, like in zip(made, (u, delta, B, C)))

    start = jnp.swapaxes(d_final, 1, 2), manual_axes.full(rates.shape, 0.0, (u, d_out))
    xs = _chunks(spec, u, delta, B, C, starts), _cut(spec, d_out), states
    (g, d_rates), made = jax.lax.scan(chunk, start, xs, reverse=True)
    du, d_delta, dB, dC = (_whole(spec, d) for d in made)
    d_skip = jnp.sum(u.astype(jnp.float32) * d_out.astype(jnp.float32), axis=(0, 1))
    return du, d_delta, d_rates.T.astype(A.dtype), dB, dC, d_skip.astype(skip.dtype), jnp.swapaxes(g, 1, 2)


def _single(
    u: Array, delta: Array, A: Array, B: Array, C: Array, skip: Array, state: Float[Array, "B D N"]
) -> tuple[Float[Array, "B 1 D"], Float[Array, "B D N"]]:
    """A step of decoding, which begins no document, with the state as it lies: compilers then read and write it once,
    in one fusion. With the axes swapped a TPU moves four times the bytes."""
    u32, step, b, c = (x[:, 0].astype(jnp.float32) for x in (u, delta, B, C))
    decay = jnp.exp(step[:, :, None] * A.astype(jnp.float32))
    state = decay * state + (step * u32)[:, :, None] * b[:, None]
    y = jnp.sum(state * c[:, None], axis=-1) + skip.astype(jnp.float32) * u32
    return y.astype(u.dtype)[:, None], state


def _step(rates: Float[Array, "N D"], state: Float[Array, "B N D"], x: _Token) -> Float[Array, "B N D"]:
    return jnp.exp(x.delta[:, None] * rates) * _kept(state, x) + (x.delta * x.u)[:, None] * x.b[:, :, None]


def _along_channels(x: Float[Array, "B N D"], y: Float[Array, "B D"]) -> Float[Array, "B N"]:
    return jnp.einsum("bnd,bd->bn", x, y, precision=jax.lax.Precision.HIGHEST)


def _kept(state: Array, x: _Token) -> Array:
    return state if x.start is None else jnp.where(x.start[:, None, None], 0.0, state)


def _wide(x: _Token) -> _Token:
    u, delta, b, c = (y.astype(jnp.float32) for y in x[:4])
    return _Token(u, delta, b, c, x.start)


def _chunks(spec: ScanSpec, u: Array, delta: Array, B: Array, C: Array, starts: Array | None) -> _Token:
    return _Token(
        _cut(spec, u), _cut(spec, delta), _cut(spec, B), _cut(spec, C), None if starts is None else _cut(spec, starts)
    )


def _cut(spec: ScanSpec, x: Array) -> Array:
    """[B, T, ...] -> [chunks, Q, B, ...]. Tokens beyond the end have delta 0: they leave the state as it is."""
    size = min(spec.chunk_size or CHUNK, spec.length)
    count = math.ceil(spec.length / size)
    x = jnp.moveaxis(x, 1, 0)
    x = jnp.pad(x, ((0, count * size - spec.length), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(count, size, *x.shape[1:])


def _whole(spec: ScanSpec, x: Array) -> Array:
    """[chunks, Q, B, ...] -> [B, T, ...]."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[: spec.length], 0, 1)
