"""Outputs: one block of threads per row and 128 channels, over the chunks in order. And a step, for both passes."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from llm_jax.kernels.manual_axes import like
from llm_jax.kernels.selective_scan.gpu import LANES, STATES, Layout

STAGES = 2
LANE = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
"""A channel per thread."""
PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)

States = tuple[Float[Array, " 128"], ...]
"""Of the channels, one vector per state."""


def load(ref: Any) -> Float[Array, " 128"]:
    """A value per channel, float32."""
    return plgpu.load(ref, layout=LANE, optimized=False).astype(jnp.float32)


def store(ref: Any, x: Float[Array, " 128"]) -> None:
    """A value per channel, in the reference's dtype."""
    plgpu.store(ref, x.astype(ref.dtype), optimized=False)


def load_states(ref: Any, channels: Any = slice(None)) -> States:
    """From [16, d] or [16, 128]."""
    return tuple(load(ref.at[n, channels]) for n in range(STATES))


def store_states(ref: Any, states: States, channels: Any = slice(None)) -> None:
    """To [16, d] or [16, 128]."""
    for n, state in enumerate(states):
        store(ref.at[n, channels], state)


def kept(states: States, start: Any) -> States:
    """Nothing of another document: `start` is 1 if a token begins one; None without documents."""
    if start is None:
        return states
    begins = lax.broadcast(start, (LANES,)) > 0
    return tuple(jnp.where(begins, 0.0, state) for state in states)


def decays(rates: States, delta: Float[Array, " 128"]) -> States:
    """exp(delta A) of a token."""
    return tuple(jnp.exp(delta * rate) for rate in rates)


def step(states: States, decay: States, inputs: Float[Array, " 128"], selected: Any) -> States:
    """The states after a token; `selected`: a reference to its B, and C behind it."""
    return tuple(decay[n] * states[n] + inputs * selected[n] for n in range(STATES))


def run(
    cut: Layout,
    u: Float[Array, "B t d"],
    delta: Float[Array, "B t d"],
    rates: Float[Array, "16 d"],
    selected: Float[Array, "B t 32"],
    starts: Float[Array, "B t"] | None,
    skip: Float[Array, " d"],
    initial: Float[Array, "B 16 d"],
    *,
    keep_states: bool,
) -> tuple[Array, Array, Array | None]:
    """Output, final state, states before each chunk [B, chunks, 16, d]; laid out as in `gpu`."""

    def kernel(
        u, delta, rates, selected, starts, skip, initial, y, final, kept_states, *, u_s, delta_s, selected_s, y_s, full
    ):
        batch, tile = lax.axis_index("batch"), lax.axis_index("tile")
        channels = pl.ds(tile * LANES, LANES)
        own_rates, own_skip = load_states(rates, channels), load(skip.at[channels])

        def fetch(j: Any) -> None:
            slot, tokens = lax.rem(j, jnp.int32(STAGES)), pl.ds(j * cut.chunk, cut.chunk)
            plgpu.copy_gmem_to_smem(u.at[batch, tokens, channels], u_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(delta.at[batch, tokens, channels], delta_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(selected.at[batch, tokens], selected_s.at[slot], full.at[slot])

        fetch(jnp.int32(0))

        def chunk(j: Array, states: States) -> States:
            slot = lax.rem(j, jnp.int32(STAGES))
            plgpu.barrier_wait(full.at[slot])
            pl.when(j + 1 < cut.chunks)(lambda: fetch(j + 1))
            if kept_states is not None:
                store_states(kept_states.at[batch, j], states, channels)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def token(t: Array, states: States) -> States:
                own_u, own_delta = load(u_s.at[slot, t]), load(delta_s.at[slot, t])
                states = kept(states, None if starts is None else starts[batch, j * cut.chunk + t])
                own = selected_s.at[slot, t]
                states = step(states, decays(own_rates, own_delta), own_delta * own_u, own)
                made = own_skip * own_u
                for n, state in enumerate(states):
                    made += state * own[STATES + n]
                store(y_s.at[t], made)
                return states

            states = lax.fori_loop(0, cut.chunk, token, states)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_s, y.at[batch, pl.ds(j * cut.chunk, cut.chunk), channels])
            return states

        states = lax.fori_loop(0, cut.chunks, chunk, load_states(initial.at[batch], channels))
        store_states(final.at[batch], states, channels)
        plgpu.wait_smem_to_gmem(0)

    kept_type = like(u, (cut.batch, cut.chunks, STATES, cut.channels))
    return plgpu.kernel(
        kernel,
        out_type=(like(u, u.shape, u.dtype), like(u, initial.shape), kept_type if keep_states else None),
        scratch_types=dict(
            u_s=plgpu.SMEM((STAGES, cut.chunk, LANES), u.dtype),
            delta_s=plgpu.SMEM((STAGES, cut.chunk, LANES), jnp.float32),
            selected_s=plgpu.SMEM((STAGES, cut.chunk, 2 * STATES), jnp.float32),
            y_s=plgpu.SMEM((cut.chunk, LANES), u.dtype),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        ),
        grid=(cut.tiles, cut.batch),
        grid_names=("tile", "batch"),
        compiler_params=PARAMS,
        kernel_name="llm_jax_selective_scan_forward",
    )(u, delta, rates, selected, starts, skip, initial)
