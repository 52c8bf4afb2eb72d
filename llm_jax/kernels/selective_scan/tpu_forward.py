"""Outputs, token by token; the states before each chunk, for the backward pass. And a step, for both passes."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.selective_scan.spec import ScanSpec
from llm_jax.kernels.selective_scan.tpu import Layout

GROUP = 16
"""Tokens that a turn of the loop takes: the rows of a tile of bfloat16."""


class In(NamedTuple):
    """Arrays, blocks or references."""

    u: Any
    delta: Any
    rates: Any
    rows: Any
    skip: Any
    initial: Any


class Out(NamedTuple):
    """As `In`; `states` may be None: not asked for."""

    y: Any
    final: Any
    states: Any


class Column(NamedTuple):
    """Of a token, to be spread over channels."""

    b: Float[Array, "N 1"]
    c: Float[Array, "N 1"]
    start: Float[Array, "1 1"] | None
    """1 if it begins a document."""

    def kept(self, state: Float[Array, "N lanes"]) -> Float[Array, "N lanes"]:
        """Nothing of another document."""
        if self.start is None:
            return state
        return jnp.where(jnp.broadcast_to(self.start, state.shape) > 0, 0.0, state)


def columns(cut: Layout, rows: Float[Array, "rows chunk"], first: Any) -> Iterator[Column]:
    """Of the tokens of a group, from the first on."""
    near = pltpu.roll(rows, (cut.chunk - first) % cut.chunk, 1)
    N = cut.states
    for i in range(GROUP):
        column = near[:, i : i + 1]
        yield Column(column[:N], column[N : 2 * N], column[2 * N : 2 * N + 1] if len(column) > 2 * N else None)


def run(
    spec: ScanSpec,
    cut: Layout,
    u: Float[Array, "B t d"],
    delta: Float[Array, "B t d"],
    rates: Float[Array, "N d"],
    rows: Float[Array, "B rows t"],
    skip: Float[Array, "1 d"],
    initial: Float[Array, "B N d"],
    *,
    keep_states: bool,
) -> Out:
    """Output, final state, states before each chunk [B, chunks, N, d]; laid out as in `tpu`."""
    Q, N, W = cut.chunk, cut.states, cut.lanes
    tokens = pl.BlockSpec((None, Q, W), lambda i, h, j: (i, j, h))
    state = pl.BlockSpec((None, N, W), lambda i, h, j: (i, 0, h))
    each = pl.BlockSpec((None, None, N, W), lambda i, h, j: (i, j, 0, h))
    in_specs = In(
        u=tokens,
        delta=tokens,
        rates=pl.BlockSpec((N, W), lambda i, h, j: (0, h)),
        rows=pl.BlockSpec((None, rows.shape[1], Q), lambda i, h, j: (i, 0, j)),
        skip=pl.BlockSpec((1, W), lambda i, h, j: (0, h)),
        initial=state,
    )
    kept = manual_axes.like(u, (spec.batch, cut.chunks, *rates.shape), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, cut=cut),
        grid=(spec.batch, cut.tiles, cut.chunks),
        in_specs=(in_specs,),
        out_specs=(Out(tokens, state, each if keep_states else None),),
        out_shape=(
            Out(
                manual_axes.like(u, u.shape, u.dtype),
                manual_axes.like(u, initial.shape, jnp.float32),
                kept if keep_states else None,
            ),
        ),
        scratch_shapes=(pltpu.VMEM((N, W), jnp.float32),),
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary"),
        name="llm_jax_selective_scan_forward",
    )
    (made,) = call(In(u, delta, rates, rows, skip, initial))
    return made


def _kernel(at: In, out: Out, held: Any, *, cut: Layout) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        held[...] = at.initial[...]

    if out.states is not None:
        out.states[...] = held[...]
    rates, skip = at.rates[...], at.skip[...]

    def group(i: Any, state: Array) -> Array:
        first = pl.multiple_of(i * GROUP, GROUP)
        place = pl.ds(first, GROUP)
        u, delta = at.u[place].astype(jnp.float32), at.delta[place]
        inputs = delta * u
        made = []
        for k, column in enumerate(columns(cut, at.rows[...], first)):
            row = slice(k, k + 1)
            state = jnp.exp(delta[row] * rates) * column.kept(state) + inputs[row] * column.b
            made.append(jnp.sum(state * column.c, axis=0, keepdims=True))
        out.y[place] = (jnp.concatenate(made) + skip * u).astype(out.y.dtype)
        return state

    state = jax.lax.fori_loop(0, cut.chunk // GROUP, group, held[...])
    held[...] = state

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out.final[...] = state
