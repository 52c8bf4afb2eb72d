"""Gradients, chunks and tokens in reverse; the states of a chunk's tokens are made again from that before it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.selective_scan.spec import ScanSpec
from llm_jax.kernels.selective_scan.tpu import Layout
from llm_jax.kernels.selective_scan.tpu_forward import GROUP, columns


class In(NamedTuple):
    """Arrays, blocks or references."""

    u: Any
    delta: Any
    rates: Any
    rows: Any
    skip: Any
    states: Any
    dy: Any
    d_final: Any


class Out(NamedTuple):
    """As `In`; of the rows only B and C."""

    du: Any
    d_delta: Any
    d_rates: Any
    d_rows: Any
    d_skip: Any
    d_initial: Any


class Scratch(NamedTuple):
    """`g` is the gradient of the state after the chunk, kept from step to step."""

    g: Any
    before: Any
    """The state that each token of the chunk goes on from, [chunk, N, lanes]."""


def run(
    spec: ScanSpec,
    cut: Layout,
    u: Float[Array, "B t d"],
    delta: Float[Array, "B t d"],
    rates: Float[Array, "N d"],
    rows: Float[Array, "B rows t"],
    skip: Float[Array, "1 d"],
    states: Float[Array, "B chunks N d"],
    dy: Float[Array, "B t d"],
    d_final: Float[Array, "B N d"],
) -> Out:
    """Gradients, laid out as in `tpu`: of rates and skip per row, of B and C per row and tile of channels."""
    Q, N, W = cut.chunk, cut.states, cut.lanes
    last = cut.chunks - 1
    tokens = pl.BlockSpec((None, Q, W), lambda i, h, j: (i, last - j, h))
    state = pl.BlockSpec((None, N, W), lambda i, h, j: (i, 0, h))
    in_specs = In(
        u=tokens,
        delta=tokens,
        rates=pl.BlockSpec((N, W), lambda i, h, j: (0, h)),
        rows=pl.BlockSpec((None, rows.shape[1], Q), lambda i, h, j: (i, 0, last - j)),
        skip=pl.BlockSpec((1, W), lambda i, h, j: (0, h)),
        states=pl.BlockSpec((None, None, N, W), lambda i, h, j: (i, last - j, 0, h)),
        dy=tokens,
        d_final=state,
    )

    def like(*shape: int, dtype: Any = jnp.float32) -> Any:
        return manual_axes.like(u, shape, dtype)

    call = pl.pallas_call(
        functools.partial(_kernel, cut=cut),
        grid=(spec.batch, cut.tiles, cut.chunks),
        in_specs=(in_specs,),
        out_specs=(
            Out(
                du=tokens,
                d_delta=tokens,
                d_rates=state,
                d_rows=pl.BlockSpec((None, None, 2 * N, Q), lambda i, h, j: (i, h, 0, last - j)),
                d_skip=pl.BlockSpec((None, 1, W), lambda i, h, j: (i, 0, h)),
                d_initial=state,
            ),
        ),
        out_shape=(
            Out(
                du=like(*u.shape, dtype=u.dtype),
                d_delta=like(*u.shape),
                d_rates=like(*d_final.shape),
                d_rows=like(spec.batch, cut.tiles, 2 * N, u.shape[1]),
                d_skip=like(spec.batch, 1, u.shape[2]),
                d_initial=like(*d_final.shape),
            ),
        ),
        scratch_shapes=(Scratch(pltpu.VMEM((N, W), jnp.float32), pltpu.VMEM((Q, N, W), jnp.float32)),),
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary"),
        name="llm_jax_selective_scan_backward",
    )
    (made,) = call(In(u, delta, rates, rows, skip, states, dy, d_final))
    return made


def _kernel(at: In, out: Out, held: Scratch, *, cut: Layout) -> None:
    N, turns = cut.states, cut.chunk // GROUP
    rates, skip = at.rates[...], at.skip[...]
    lane = jax.lax.broadcasted_iota(jnp.int32, (N, cut.chunk), 1)

    @pl.when(pl.program_id(2) == 0)
    def _():
        held.g[...] = at.d_final[...]
        out.d_rates[...] = jnp.zeros_like(out.d_rates)
        out.d_skip[...] = jnp.zeros_like(out.d_skip)

    def states(i: Any, state: Array) -> Array:
        first = pl.multiple_of(i * GROUP, GROUP)
        place = pl.ds(first, GROUP)
        delta = at.delta[place]
        inputs = delta * at.u[place].astype(jnp.float32)
        for k, column in enumerate(columns(cut, at.rows[...], first)):
            row = slice(k, k + 1)
            state = column.kept(state)
            held.before[first + k] = state
            state = jnp.exp(delta[row] * rates) * state + inputs[row] * column.b
        return state

    def gradients(turn: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        g, d_rates, db, dc = carry
        first = pl.multiple_of((turns - 1 - turn) * GROUP, GROUP)
        place = pl.ds(first, GROUP)
        u, dy = (ref[place].astype(jnp.float32) for ref in (at.u, at.dy))
        delta = at.delta[place]
        inputs = delta * u
        d_inputs, d_exponents = [], []
        for k, column in reversed(list(enumerate(columns(cut, at.rows[...], first)))):
            row = slice(k, k + 1)
            before, decay = held.before[first + k], jnp.exp(delta[row] * rates)
            state = decay * before + inputs[row] * column.b
            g += dy[row] * column.c
            here = lane == first + k
            db = jnp.where(here, jnp.sum(g * inputs[row], axis=1, keepdims=True), db)
            dc = jnp.where(here, jnp.sum(state * dy[row], axis=1, keepdims=True), dc)
            d_inputs.append(jnp.sum(g * column.b, axis=0, keepdims=True))
            g *= decay
            d_exponent = g * before
            d_exponents.append(jnp.sum(d_exponent * rates, axis=0, keepdims=True))
            d_rates += d_exponent * delta[row]
            g = column.kept(g)
        d_input, d_exponent = (jnp.concatenate(rows[::-1]) for rows in (d_inputs, d_exponents))
        out.du[place] = (delta * d_input + skip * dy).astype(out.du.dtype)
        out.d_delta[place] = u * d_input + d_exponent
        out.d_skip[...] += jnp.sum(u * dy, axis=0, keepdims=True)
        return g, d_rates, db, dc

    jax.lax.fori_loop(0, turns, states, at.states[...])
    nothing = jnp.zeros((N, cut.chunk), jnp.float32)
    g, d_rates, db, dc = jax.lax.fori_loop(0, turns, gradients, (held.g[...], out.d_rates[...], nothing, nothing))
    held.g[...], out.d_rates[...] = g, d_rates
    out.d_rows[...] = jnp.concatenate([db, dc])

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out.d_initial[...] = g
