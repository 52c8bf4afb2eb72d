"""Gradients: one block of threads per row and 128 channels, over the chunks in reverse.

Of a chunk, first the state before each group of four tokens is made again and put into shared memory; then, groups in
reverse, the four states in registers. Gradients of B and C are sums over channels, that is over threads: what is to be
summed is written to shared memory and read as a matrix whose rows are summed.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from llm_jax.kernels.manual_axes import like
from llm_jax.kernels.selective_scan.gpu import GROUP, LANES, STATES, Layout
from llm_jax.kernels.selective_scan.gpu_forward import (
    LANE,
    PARAMS,
    States,
    decays,
    kept,
    load,
    load_states,
    step,
    store,
    store_states,
)


def run(
    cut: Layout,
    u: Float[Array, "B t d"],
    delta: Float[Array, "B t d"],
    rates: Float[Array, "16 d"],
    selected: Float[Array, "B t 32"],
    starts: Float[Array, "B t"] | None,
    skip: Float[Array, " d"],
    states: Float[Array, "B chunks 16 d"],
    dy: Float[Array, "B t d"],
    d_final: Float[Array, "B 16 d"],
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Gradients of u, delta, rates (per row), B and C per tile of channels [B, tiles, 2, 16 t], skip (per row) and the
    initial state."""
    groups = cut.chunk // GROUP

    def kernel(
        u, delta, rates, selected, starts, skip, states, dy, d_final,
        du, d_delta, d_rates, d_selected, d_skip, d_initial,
        *, u_s, delta_s, dy_s, selected_s, before_s, to_sum_s, du_s, d_delta_s, full,
    ):  # fmt: skip
        batch, tile = lax.axis_index("batch"), lax.axis_index("tile")
        channels = pl.ds(tile * LANES, LANES)
        own_rates, own_skip = load_states(rates, channels), load(skip.at[channels])
        nothing = plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), LANE)

        def fetch(j: Any) -> None:
            tokens = pl.ds(j * cut.chunk, cut.chunk)
            for ref, buffer in ((u, u_s), (delta, delta_s), (dy, dy_s)):
                plgpu.copy_gmem_to_smem(ref.at[batch, tokens, channels], buffer, full)
            plgpu.copy_gmem_to_smem(selected.at[batch, tokens], selected_s, full)

        def start(j: Any, t: Any) -> Any:
            return None if starts is None else starts[batch, j * cut.chunk + t]

        def chunk(i: Array, carry: tuple[States, States, Array]) -> tuple[States, States, Array]:
            j = cut.chunks - 1 - i
            fetch(j)
            plgpu.barrier_wait(full)

            def forward(g: Array, state: States) -> States:
                store_states(before_s.at[g], state)
                for k in range(GROUP):
                    t = g * GROUP + k
                    own_delta = load(delta_s.at[t])
                    inputs, own = own_delta * load(u_s.at[t]), selected_s.at[t]
                    state = step(kept(state, start(j, t)), decays(own_rates, own_delta), inputs, own)
                return state

            lax.fori_loop(0, groups, forward, load_states(states.at[batch, j], channels))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def group(step_back: Array, carry: tuple[States, States, Array]) -> tuple[States, States, Array]:
                gradient, d_own_rates, d_own_skip = carry
                g = groups - 1 - step_back
                state, held = load_states(before_s.at[g]), []
                for k in range(GROUP):
                    t = g * GROUP + k
                    own_delta = load(delta_s.at[t])
                    state, decay = kept(state, start(j, t)), decays(own_rates, own_delta)
                    held.append((state, decay))
                    state = step(state, decay, own_delta * load(u_s.at[t]), selected_s.at[t])
                for k in reversed(range(GROUP)):
                    t = g * GROUP + k
                    own_delta, own_u, own_dy = load(delta_s.at[t]), load(u_s.at[t]), load(dy_s.at[t])
                    own = selected_s.at[t]
                    inputs, d_input, d_exponent = own_delta * own_u, nothing, nothing
                    before, decay = held[k]
                    made, d_made = [], []
                    for n in range(STATES):
                        new = decay[n] * before[n] + inputs * own[n]
                        grown = gradient[n] + own_dy * own[STATES + n]
                        store(to_sum_s.at[0, k * STATES + n], grown * inputs)
                        store(to_sum_s.at[1, k * STATES + n], new * own_dy)
                        d_input += grown * own[n]
                        through = grown * decay[n]
                        d_decay = through * before[n]
                        d_exponent += d_decay * own_rates[n]
                        made.append(through)
                        d_made.append(d_own_rates[n] + d_decay * own_delta)
                    gradient, d_own_rates = kept(tuple(made), start(j, t)), tuple(d_made)
                    store(du_s.at[t], own_delta * d_input + own_skip * own_dy)
                    store(d_delta_s.at[t], own_u * d_input + d_exponent)
                    d_own_skip += own_u * own_dy
                plgpu.commit_smem()
                for kind in range(2):
                    rows = plgpu.load(to_sum_s.at[kind], layout=plgpu.Layout.WGMMA, optimized=False)
                    place = pl.ds((j * cut.chunk + g * GROUP) * STATES, GROUP * STATES)
                    plgpu.store(d_selected.at[batch, tile, kind, place], jnp.sum(rows, axis=1), optimized=False)
                plgpu.commit_smem()
                return gradient, d_own_rates, d_own_skip

            carry = lax.fori_loop(0, groups, group, carry)
            tokens = pl.ds(j * cut.chunk, cut.chunk)
            plgpu.copy_smem_to_gmem(du_s, du.at[batch, tokens, channels])
            plgpu.copy_smem_to_gmem(d_delta_s, d_delta.at[batch, tokens, channels])
            return carry

        carry = load_states(d_final.at[batch], channels), (nothing,) * STATES, nothing
        gradient, d_own_rates, d_own_skip = lax.fori_loop(0, cut.chunks, chunk, carry)
        store_states(d_initial.at[batch], gradient, channels)
        store_states(d_rates.at[batch], d_own_rates, channels)
        store(d_skip.at[batch, channels], d_own_skip)
        plgpu.wait_smem_to_gmem(0)

    tokens = (cut.chunk, LANES)
    return plgpu.kernel(
        kernel,
        out_type=(
            like(u, u.shape, u.dtype),
            like(u, u.shape),
            like(u, d_final.shape),
            like(u, (cut.batch, cut.tiles, 2, cut.length * STATES)),
            like(u, (cut.batch, cut.channels)),
            like(u, d_final.shape),
        ),
        scratch_types=dict(
            u_s=plgpu.SMEM(tokens, u.dtype),
            delta_s=plgpu.SMEM(tokens, jnp.float32),
            dy_s=plgpu.SMEM(tokens, dy.dtype),
            selected_s=plgpu.SMEM((cut.chunk, 2 * STATES), jnp.float32),
            before_s=plgpu.SMEM((groups, STATES, LANES), jnp.float32),
            to_sum_s=plgpu.SMEM((2, GROUP * STATES, LANES), jnp.float32),
            du_s=plgpu.SMEM(tokens, u.dtype),
            d_delta_s=plgpu.SMEM(tokens, jnp.float32),
            full=plgpu.Barrier(num_arrivals=4),
        ),
        grid=(cut.tiles, cut.batch),
        grid_names=("tile", "batch"),
        compiler_params=PARAMS,
        kernel_name="llm_jax_selective_scan_backward",
    )(u, delta, rates, selected, starts, skip, states, dy, d_final)
