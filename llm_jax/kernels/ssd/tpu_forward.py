"""Outputs, chunk by chunk; the states before each chunk, for the backward pass."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.mosaic_tpu import dot
from llm_jax.kernels.ssd import tpu_chunk
from llm_jax.kernels.ssd.spec import SsdSpec
from llm_jax.kernels.ssd.tpu import Layout


class In(NamedTuple):
    """Arrays, blocks or references."""

    x: Any
    rows: Any
    run: Any
    b: Any
    c: Any
    skip: Any
    initial: Any


class Out(NamedTuple):
    """As `In`; `states` may be None: not asked for."""

    y: Any
    final: Any
    states: Any


class Scratch(NamedTuple):
    """Kept from step to step of the grid."""

    state: Any
    """Before the chunk, [tiles, N, width]."""
    products: Any
    """C Bᵀ of the chunk."""
    bias: Any
    """-inf where a token does not see another."""


def run(
    spec: SsdSpec,
    cut: Layout,
    x: Float[Array, "B t HP"],
    rows: Float[Array, "3 B tiles heads t"],
    run: Float[Array, "B 1 t"] | None,
    b: Float[Array, "B t GN"],
    c: Float[Array, "B t GN"],
    skip: Float[Array, "1 HP"],
    initial: Float[Array, "B N HP"],
    *,
    keep_states: bool,
) -> Out:
    """Output, final state, states before each chunk [B, chunks, N, HP]; laid out as in `tpu`."""
    Q, N, W = cut.chunk, cut.states, cut.width
    last = cut.chunks - 1

    def tile(g: Any, h: Any) -> Any:
        return g * cut.tiles + h

    tokens = pl.BlockSpec((None, Q, W), lambda i, g, j, h: (i, j, tile(g, h)))
    of_group = pl.BlockSpec((None, Q, N), lambda i, g, j, h: (i, j, g))
    # Blocks that only the first or the last chunk touches stay where they are in the others: nothing is moved.
    first_only = pl.BlockSpec((None, N, W), lambda i, g, j, h: (i, 0, tile(g, jnp.where(j == 0, h, cut.tiles - 1))))
    last_only = pl.BlockSpec((None, N, W), lambda i, g, j, h: (i, 0, tile(g, jnp.where(j == last, h, 0))))
    in_specs = In(
        x=tokens,
        rows=pl.BlockSpec((3, None, None, cut.heads, Q), lambda i, g, j, h: (0, i, tile(g, h), 0, j)),
        run=None if run is None else pl.BlockSpec((None, 1, Q), lambda i, g, j, h: (i, 0, j)),
        b=of_group,
        c=of_group,
        skip=pl.BlockSpec((1, W), lambda i, g, j, h: (0, tile(g, h))),
        initial=first_only,
    )
    each = pl.BlockSpec((None, None, N, W), lambda i, g, j, h: (i, j, 0, tile(g, h)))
    kept = manual_axes.like(x, (spec.batch, cut.chunks, N, x.shape[2]), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, cut=cut),
        grid=(spec.batch, spec.groups, cut.chunks, cut.tiles),
        in_specs=(in_specs,),
        out_specs=(Out(tokens, last_only, each if keep_states else None),),
        out_shape=(
            Out(
                manual_axes.like(x, x.shape, x.dtype),
                manual_axes.like(x, initial.shape, jnp.float32),
                kept if keep_states else None,
            ),
        ),
        scratch_shapes=(
            Scratch(
                pltpu.VMEM((cut.tiles, N, W), jnp.float32),
                pltpu.VMEM((Q, Q), jnp.float32),
                pltpu.VMEM((Q, Q), jnp.float32),
            ),
        ),
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary", "arbitrary"),
        name="llm_jax_ssd_forward",
    )
    (made,) = call(In(x, rows, run, b, c, skip, initial))
    return made


def _kernel(at: In, out: Out, held: Scratch, *, cut: Layout) -> None:
    j, h = pl.program_id(2), pl.program_id(3)
    b, c, x = at.b[...], at.c[...], at.x[...]

    @pl.when(h == 0)
    def _():
        t, s = tpu_chunk.places(cut.chunk)
        seen = t >= s if at.run is None else (t >= s) & tpu_chunk.same_document(at.run[...])
        held.bias[...] = jnp.where(seen, 0.0, -jnp.inf)
        held.products[...] = dot(c, b, 1, 1)

    @pl.when(j == 0)
    def _():
        held.state[h] = at.initial[...]

    state = held.state[h]
    if out.states is not None:
        out.states[...] = state
    chunk = tpu_chunk.chunk(at.rows[...], None if at.run is None else at.run[...])
    spread = functools.partial(tpu_chunk.spread, cut)
    x32 = x.astype(jnp.float32)
    inputs32 = spread(chunk.dt) * x32
    since = spread(chunk.since)
    arriving = (spread(chunk.until) * inputs32).astype(x.dtype)
    end = since[-1:] * state + dot(b, arriving, 0, 0)
    held.state[h] = end

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        out.final[...] = end

    from_state = since * dot(c, state.astype(x.dtype), 1, 0) + at.skip[...] * x32
    products, bias = held.products[...], held.bias[...]
    for lanes, heads in tpu_chunk.panels(cut):
        within = None
        for head in heads:
            weights = products * (chunk.between(head, bias) * chunk.steps(head))
            made = dot(weights.astype(x.dtype), x[:, lanes], 1, 0)
            within = made if within is None else tpu_chunk.own(cut, head, made, within)
        out.y[:, lanes] = (from_state[:, lanes] + within).astype(x.dtype)
