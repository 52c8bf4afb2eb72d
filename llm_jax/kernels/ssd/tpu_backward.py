"""Gradients, chunks in reverse; what a chunk computed is made again from the state before it."""

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
from llm_jax.kernels.ssd.tpu_chunk import wide_dot


class In(NamedTuple):
    """Arrays, blocks or references."""

    x: Any
    rows: Any
    run: Any
    b: Any
    c: Any
    skip: Any
    states: Any
    dy: Any
    d_final: Any


class Out(NamedTuple):
    """As `In`. `d_exponent` is that of dt A, `d_scale` that of dt as a factor of x."""

    dx: Any
    d_exponent: Any
    d_scale: Any
    db: Any
    dc: Any
    d_skip: Any
    d_initial: Any


class Scratch(NamedTuple):
    """Kept from step to step of the grid; the last three are sums over the heads of a chunk."""

    d_state: Any
    """Gradient of the state after the chunk, [tiles, N, width]."""
    d_skip: Any
    """[tiles, 1, width]."""
    products: Any
    bias: Any
    """-inf where a token does not see another."""
    between_ends: Any
    """1 where the second token comes after the first in its document: what lies between passes by the second."""
    d_products: Any
    db: Any
    dc: Any


def run(
    spec: SsdSpec,
    cut: Layout,
    x: Float[Array, "B t HP"],
    rows: Float[Array, "3 B tiles heads t"],
    run: Float[Array, "B 1 t"] | None,
    b: Float[Array, "B t GN"],
    c: Float[Array, "B t GN"],
    skip: Float[Array, "1 HP"],
    states: Float[Array, "B chunks N HP"],
    dy: Float[Array, "B t HP"],
    d_final: Float[Array, "B N HP"],
) -> Out:
    """Gradients, laid out as in `tpu`; that of skip per row and lane."""
    Q, N, W = cut.chunk, cut.states, cut.width
    last = cut.chunks - 1

    def tile(g: Any, h: Any) -> Any:
        return g * cut.tiles + h

    tokens = pl.BlockSpec((None, Q, W), lambda i, g, j, h: (i, last - j, tile(g, h)))
    of_group = pl.BlockSpec((None, Q, N), lambda i, g, j, h: (i, last - j, g))
    per_head = pl.BlockSpec((None, None, cut.heads, Q), lambda i, g, j, h: (i, tile(g, h), 0, last - j))
    # Blocks that only the first or the last step touches stay where they are in the others: nothing is moved.
    first_only = pl.BlockSpec((None, N, W), lambda i, g, j, h: (i, 0, tile(g, jnp.where(j == 0, h, cut.tiles - 1))))
    last_only = pl.BlockSpec((None, N, W), lambda i, g, j, h: (i, 0, tile(g, jnp.where(j == last, h, 0))))
    last_lanes = pl.BlockSpec((None, 1, W), lambda i, g, j, h: (i, 0, tile(g, jnp.where(j == last, h, 0))))
    in_specs = In(
        x=tokens,
        rows=pl.BlockSpec((3, None, None, cut.heads, Q), lambda i, g, j, h: (0, i, tile(g, h), 0, last - j)),
        run=None if run is None else pl.BlockSpec((None, 1, Q), lambda i, g, j, h: (i, 0, last - j)),
        b=of_group,
        c=of_group,
        skip=pl.BlockSpec((1, W), lambda i, g, j, h: (0, tile(g, h))),
        states=pl.BlockSpec((None, None, N, W), lambda i, g, j, h: (i, last - j, 0, tile(g, h))),
        dy=tokens,
        d_final=first_only,
    )

    def like(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        return manual_axes.like(x, shape, dtype)

    def square(dtype: Any = jnp.float32) -> Any:
        return pltpu.VMEM((Q, Q), dtype)

    scratch = Scratch(
        d_state=pltpu.VMEM((cut.tiles, N, W), jnp.float32),
        d_skip=pltpu.VMEM((cut.tiles, 1, W), jnp.float32),
        products=square(),
        bias=square(),
        between_ends=square(x.dtype),
        d_products=square(),
        db=pltpu.VMEM((Q, N), jnp.float32),
        dc=pltpu.VMEM((Q, N), jnp.float32),
    )
    call = pl.pallas_call(
        functools.partial(_kernel, cut=cut),
        grid=(spec.batch, spec.groups, cut.chunks, cut.tiles),
        in_specs=(in_specs,),
        out_specs=(Out(tokens, per_head, per_head, of_group, of_group, last_lanes, last_only),),
        out_shape=(
            Out(
                dx=like(x.shape, x.dtype),
                d_exponent=like(rows.shape[1:]),
                d_scale=like(rows.shape[1:]),
                db=like(b.shape, b.dtype),
                dc=like(c.shape, c.dtype),
                d_skip=like((spec.batch, 1, x.shape[2])),
                d_initial=like(d_final.shape),
            ),
        ),
        scratch_shapes=(scratch,),
        compiler_params=mosaic_tpu.params("parallel", "parallel", "arbitrary", "arbitrary"),
        name="llm_jax_ssd_backward",
    )
    (made,) = call(In(x, rows, run, b, c, skip, states, dy, d_final))
    return made


def _kernel(at: In, out: Out, held: Scratch, *, cut: Layout) -> None:
    j, h = pl.program_id(2), pl.program_id(3)
    b, c, x, dy = at.b[...], at.c[...], at.x[...], at.dy[...]
    t, s = tpu_chunk.places(cut.chunk)
    low = x.dtype

    @pl.when(h == 0)
    def _():
        seen, later = t >= s, t < s
        if at.run is not None:
            same = tpu_chunk.same_document(at.run[...])
            seen, later = seen & same, later & same
        held.bias[...] = jnp.where(seen, 0.0, -jnp.inf)
        held.between_ends[...] = later.astype(jnp.float32).astype(low)
        held.products[...] = dot(c, b, 1, 1)
        for total in (held.d_products, held.db, held.dc):
            total[...] = jnp.zeros_like(total)

    @pl.when(j == 0)
    def _():
        held.d_state[h] = at.d_final[...]
        held.d_skip[h] = jnp.zeros_like(held.d_skip[h])

    state, d_end = at.states[...], held.d_state[h]
    d_end_low = d_end.astype(low)
    chunk = tpu_chunk.chunk(at.rows[...], None if at.run is None else at.run[...])
    spread = functools.partial(tpu_chunk.spread, cut)
    sums_of_heads = functools.partial(tpu_chunk.sums_of_heads, cut)
    x32, dy32 = x.astype(jnp.float32), dy.astype(jnp.float32)
    dt, since, until = spread(chunk.dt), spread(chunk.since), spread(chunk.until)
    inputs32 = dt * x32

    # From the state before: y += since (c state). To the state after: until inputs b, and what is left of before.
    since_dy32 = since * dy32
    to_inputs = until * dot(b, d_end_low, 1, 0)
    d_since = sums_of_heads(since_dy32 * wide_dot(c, state, 1, 0))
    d_until = sums_of_heads(to_inputs * inputs32)
    d_last = sums_of_heads(since[-1:] * jnp.sum(d_end * state, axis=0, keepdims=True))
    held.dc[...] += dot(since_dy32.astype(low), state.astype(low), 1, 1)
    held.db[...] += dot((until * inputs32).astype(low), d_end_low, 1, 1)
    d_before = since[-1:] * d_end + wide_dot(c, since_dy32, 0, 0)
    held.d_state[h] = d_before
    d_skip = held.d_skip[h] + jnp.sum(x32 * dy32, axis=0, keepdims=True)
    held.d_skip[h] = d_skip

    # Within the chunk: y = (products * between) inputs.
    products, bias, between_ends = held.products[...], held.bias[...], held.between_ends[...]
    seen, passed_until = bias == 0, between_ends != 0
    d_products, d_exponent, d_scale = jnp.zeros_like(products), [], []
    for lanes, heads in tpu_chunk.panels(cut):
        d_inputs = None
        for head in heads:
            between = chunk.between(head, bias)
            own_dy, own_x = (tpu_chunk.own(cut, head, y[:, lanes]) for y in (dy, x))
            d_weights = dot(own_dy, own_x, 1, 1) * (between * chunk.steps(head))
            d_products += d_weights
            made = dot((products * between).astype(low), dy[:, lanes], 0, 0)
            d_inputs = made if d_inputs is None else tpu_chunk.own(cut, head, made, d_inputs)
            # What token t has from all before u passes u's decay if u is not after t; see `decay.exponent_gradient`.
            passing = wide_dot(d_weights * products, between_ends, 1, 0) + d_since[head]
            passing = jnp.where(seen, passing, jnp.where(passed_until, d_until[head], 0.0))
            d_exponent.append(jnp.sum(passing, axis=0, keepdims=True) + d_last[head])
        assert d_inputs is not None
        d_inputs += to_inputs[:, lanes]
        out.dx[:, lanes] = (dt[:, lanes] * d_inputs + at.skip[:, lanes] * dy32[:, lanes]).astype(low)
        for head in heads:
            own = tpu_chunk.own(cut, head, x32[:, lanes] * d_inputs)
            d_scale.append(jnp.sum(own, axis=1, keepdims=True))
    held.d_products[...] += d_products
    out.d_exponent[...] = jnp.concatenate(d_exponent, axis=0)
    out.d_scale[...] = jnp.concatenate(d_scale, axis=1).T

    @pl.when(h == pl.num_programs(3) - 1)
    def _():
        d_products = held.d_products[...].astype(low)
        out.dc[...] = (held.dc[...] + dot(d_products, b, 1, 0)).astype(low)
        out.db[...] = (held.db[...] + dot(d_products, c, 0, 0)).astype(low)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        out.d_initial[...] = d_before
        out.d_skip[...] = d_skip
