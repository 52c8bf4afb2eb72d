"""Gradients within the chunks: one block of threads per chunk and a few heads, which it takes one after another.

Two warpgroups, each with 64 tokens. Tiles of pairs of tokens are transposed, [source, reader]: a warpgroup has all the
readers of its sources. What both need (products of pairs, sums per token) goes through shared memory.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels.manual_axes import like
from llm_jax.kernels.ssd.decay import remaining
from llm_jax.kernels.ssd.gpu import CHUNK, HALF, Layout
from llm_jax.kernels.ssd.gpu_chunk import (
    WARPGROUPS,
    Rows,
    between,
    exponents,
    matrices,
    nothing,
    over,
    product,
    read,
    same_document,
    sees,
    since,
    vector,
)

SEEN = 3
"""Of the six masks of tiles: the first three say which sources come before a token in its document, [token, source];
the others which readers see a source, [source, reader]. Tiles of halves (0, 0), (0, 1), (1, 1)."""


def run(
    cut: Layout,
    most: int,
    x: Float[Array, "B t h 64"],
    rows: Float[Array, "2 B h t"],
    run: Int[Array, "B t"] | None,
    b: Float[Array, "B t G 128"],
    c: Float[Array, "B t G 128"],
    skip: Float[Array, " h"],
    states: Float[Array, "B h chunks 128 64"],
    d_states: Float[Array, "B h chunks 128 64"],
    dy: Float[Array, "B t h 64"],
) -> tuple[Array, Array]:
    """Gradients of x, and per token [4, B, h, t] those of the exponent (without what passes the whole chunk), of dt as
    a factor of x, and of skip; and of each source, the sum of what its readers' decays pass times their exponents, of
    which the gradient of A is made. `most`: heads of a block."""
    dtype, halves = x.dtype, range(WARPGROUPS)
    per_block = cut.heads_of_block(most)
    blocks = cut.heads // per_block

    def kernel(
        x, rows, run, b, c, skip, states, d_states, dy, dx, sums,
        *, x_s, dy_s, b_s, c_s, state_s, d_state_s, low_s, pairs_s, masks_s, vectors_s, shared, full, both,
    ):  # fmt: skip
        batch, j, block, w = (lax.axis_index(name) for name in ("batch", "chunk", "block", "warpgroup"))
        first = block * per_block
        group = lax.div(first, jnp.int32(cut.per_group))
        start = j * CHUNK
        mine = pl.ds(start + w * HALF, HALF)
        other = 1 - w

        def fetch(head: Any) -> None:
            for half in halves:
                at, state_rows = pl.ds(start + half * HALF, HALF), pl.ds(half * HALF, HALF)
                plgpu.copy_gmem_to_smem(x.at[batch, at, head], x_s.at[half], full)
                plgpu.copy_gmem_to_smem(dy.at[batch, at, head], dy_s.at[half], full)
                plgpu.copy_gmem_to_smem(states.at[batch, head, j, state_rows], state_s.at[half], full)
                plgpu.copy_gmem_to_smem(d_states.at[batch, head, j, state_rows], d_state_s.at[half], full)

        @pl.when(w == 0)
        def _() -> None:
            for half in halves:
                for panel in halves:
                    at, columns = pl.ds(start + half * HALF, HALF), pl.ds(panel * HALF, HALF)
                    plgpu.copy_gmem_to_smem(b.at[batch, at, group, columns], b_s.at[half, panel], shared)
                    plgpu.copy_gmem_to_smem(c.at[batch, at, group, columns], c_s.at[half, panel], shared)
            fetch(first)

        # Masks are read from shared memory: what they are made of would be kept in registers from head to head.
        at = Rows(rows, run, batch, first, start)

        def mask_before(half: Array, _: None) -> None:
            later, earlier = at.side(w, 0), at.side(half, 1)
            before = later.place > earlier.place
            if run is not None:
                before &= same_document(later, 0, earlier)
            masks_s[w + half] = jnp.where(before, 1.0, 0.0).astype(dtype)

        def mask_seen(half: Array, _: None) -> None:
            masks_s[SEEN + w + half] = jnp.where(sees(at.side(half, 1), 1, at.side(w, 0)), 1.0, 0.0).astype(dtype)

        lax.fori_loop(0, w + 1, mask_before, None)
        lax.fori_loop(w, 2, mask_seen, None)
        plgpu.commit_smem()
        plgpu.barrier_wait(shared)

        def one_head(i: Array, _: None) -> None:
            head = first + i
            at = Rows(rows, run, batch, head, start)
            tokens = at.side(w, 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_wait(full)

            def tile(half: Any, passed: Array) -> Array:
                left = between(at.side(half, 1), 1, tokens, read(masks_s.at[SEEN + w + half]) > 0)
                low = left * product(*((b_s.at[w, panel], c_s.at[half, panel].T) for panel in halves))
                low_s[w + half] = low.astype(dtype)
                d_left = product((x_s.at[w], dy_s.at[half].T)) * over(tokens.dt, 0)
                pairs = d_left * low
                pairs_s[w + half] = pairs.astype(dtype)
                # Not of the rounded pairs: each counts for all tokens between its two, and so does its error.
                return passed + jnp.sum(pairs * exponents(at.side(half, 1), 1, tokens), axis=1)

            none = plgpu.layout_cast(jnp.zeros(HALF, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            weighted = lax.fori_loop(w, WARPGROUPS, tile, none)
            plgpu.commit_smem()

            # From the state before the chunk.
            from_state = product(*((c_s.at[w, panel], state_s.at[panel]) for panel in halves))
            from_before = remaining(since(tokens), jnp.sum(read(dy_s.at[w]) * from_state, axis=1))
            vectors_s[0, w] = from_before

            # To the state after it, and within it.
            d_inputs = product(*((b_s.at[w, panel], d_state_s.at[panel]) for panel in halves))
            until = at.until(tokens)
            to_after = remaining(until * tokens.dt, jnp.sum(d_inputs * read(x_s.at[w]), axis=1))
            vectors_s[1, w] = to_after
            weighted += from_before * tokens.total + to_after * (at.total - tokens.total)
            plgpu.store(sums.at[3, batch, head, mine], weighted, optimized=False)
            d_inputs = remaining(over(until, 0), d_inputs) + product((low_s.at[2 * w], dy_s.at[w]))
            d_inputs = lax.fori_loop(w, 1, lambda _, total: total + product((low_s.at[1], dy_s.at[1])), d_inputs)
            plgpu.store(sums.at[1, batch, head, mine], jnp.sum(read(x_s.at[w]) * d_inputs, axis=1), optimized=False)
            low_s[2 * w] = (over(tokens.dt, 0) * d_inputs + skip[head] * read(dy_s.at[w])).astype(dtype)
            d_skip = jnp.sum(read(x_s.at[w]) * read(dy_s.at[w]), axis=1)
            plgpu.store(sums.at[2, batch, head, mine], d_skip, optimized=False)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(low_s.at[2 * w], dx.at[batch, mine, head])
            plgpu.barrier_arrive_and_wait(both)
            pl.when((w == 0) & (i + 1 < per_block))(lambda: fetch(head + 1))

            # The decay of token u (along rows) is passed by what later readers have from before it; see
            # `decay.exponent_gradient`. In the own half:
            def passing(half: Array, total: Array) -> Array:
                return total + product((masks_s.at[w + half], pairs_s.at[half + w]))

            passed = lax.fori_loop(0, w + 1, passing, nothing()) + over(vector(vectors_s.at[0, w], 1), 1)
            passed = jnp.where(read(masks_s.at[SEEN + 2 * w]) > 0, passed, 0.0)
            passed += jnp.where(read(masks_s.at[2 * w]) > 0, over(vector(vectors_s.at[1, w], 1), 1), 0.0)
            total = jnp.sum(passed, axis=1)
            # In the other half: readers, if it is the later one; or sources of the state after the chunk.
            passed = lax.fori_loop(w, 1, lambda _, total: total + product((masks_s.at[0], pairs_s.at[1])), nothing())
            passed += over(vector(vectors_s.at[w, other], 1), 1)
            is_own = read(masks_s.at[1 + SEEN * other]) > 0
            passed = jnp.where(is_own, passed, 0.0)
            plgpu.store(sums.at[0, batch, head, mine], total + jnp.sum(passed, axis=1), optimized=False)
            plgpu.barrier_arrive_and_wait(both)

        lax.fori_loop(0, per_block, one_head, None)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            like(x, x.shape, dtype),
            like(x, (4, *rows.shape[1:]), jnp.float32),
        ),
        scratch_types=dict(
            x_s=matrices(2, dtype=dtype),
            dy_s=matrices(2, dtype=dtype),
            b_s=matrices(2, 2, dtype=dtype),
            c_s=matrices(2, 2, dtype=dtype),
            state_s=matrices(2, dtype=dtype),
            d_state_s=matrices(2, dtype=dtype),
            low_s=matrices(3, dtype=dtype),
            pairs_s=matrices(3, dtype=dtype),
            masks_s=matrices(6, dtype=dtype),
            vectors_s=plgpu.SMEM((2, 2, HALF), jnp.float32),
            shared=plgpu.Barrier(num_arrivals=8),
            full=plgpu.Barrier(num_arrivals=8),
            both=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(blocks, cut.chunks, cut.batch),
        grid_names=("block", "chunk", "batch"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="llm_jax_ssd_backward",
    )(x, rows, run, b, c, skip, states, d_states, dy)
