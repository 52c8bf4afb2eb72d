"""What the TPU kernels of `ssd` make of a chunk: decays per token, spread over lanes; masks; heads within panels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels import mosaic_tpu
from llm_jax.kernels.ssd.tpu import LANES, Layout


class Chunk(NamedTuple):
    """Of Q tokens and the heads of a tile. `*_rows` have tokens along lanes, the others are columns, one per head."""

    last_rows: Float[Array, "heads 1"]
    """What is left after the chunk of the state before it."""
    coarse_rows: Float[Array, "heads Q"]
    fine_rows: Float[Array, "heads Q"]
    dt_rows: Float[Array, "heads Q"]
    coarse: Float[Array, "Q heads"]
    fine: Float[Array, "Q heads"]
    dt: Float[Array, "Q heads"]
    since: Float[Array, "Q heads"]
    until: Float[Array, "Q heads"]

    def between(self, head: int, bias: Float[Array, "Q Q"]) -> Float[Array, "Q Q"]:
        """What is left at token t (first axis) of token s; `bias` is -inf where t does not see s."""
        one = slice(head, head + 1)
        coarse = self.coarse[:, one] - self.coarse_rows[one]
        return jnp.exp(coarse + (self.fine[:, one] - self.fine_rows[one]) + bias)

    def steps(self, head: int) -> Float[Array, "1 Q"]:
        """Step sizes, which go with the weights of pairs: x is then a factor as it came, not rounded once more."""
        return self.dt_rows[head : head + 1]


def chunk(rows: Float[Array, "3 heads Q"], run: Float[Array, "1 Q"] | None) -> Chunk:
    """From step sizes and running sums (coarse, fine), and the documents that began in the chunk up to each token."""
    dt, coarse, fine = rows[0], rows[1], rows[2]
    since = coarse + fine
    until = (coarse[:, -1:] - coarse) + (fine[:, -1:] - fine)
    if run is not None:
        since = jnp.where(run == 0, since, -jnp.inf)
        until = jnp.where(run == run[:, -1:], until, -jnp.inf)
    since, until = jnp.exp(since), jnp.exp(until)
    heads = dt.shape[0]
    columns = jnp.concatenate([coarse, fine, dt, since, until]).T
    return Chunk(since[:, -1:], coarse, fine, dt, *(columns[:, i * heads : (i + 1) * heads] for i in range(5)))


def same_document(run: Float[Array, "1 Q"]) -> Array:
    """bool[Q, Q]."""
    rows = jnp.broadcast_to(run, (8, run.shape[1]))  # a whole tile, for the transpose
    return rows.T[:, :1] == run


def places(size: int) -> tuple[Array, Array]:
    """Indices of the first and of the second axis of [Q, Q]."""
    return (
        jax.lax.broadcasted_iota(jnp.int32, (size, size), 0),
        jax.lax.broadcasted_iota(jnp.int32, (size, size), 1),
    )


def wide_dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Float[Array, "m n"]:
    """`dot` of two matrices, of which one is float32: in two parts if the other is narrow. Rounded once, what cancels
    in the gradient of A would be lost."""
    if a.dtype == b.dtype:
        return mosaic_tpu.dot(a, b, a_axis, b_axis)
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    made = [mosaic_tpu.dot(x, y, a_axis, b_axis) for x in _parts(a, narrow) for y in _parts(b, narrow)]
    return made[0] + made[1]


def _parts(x: Array, dtype: Any) -> list[Array]:
    """What adds up to x."""
    if x.dtype == dtype:
        return [x]
    high = x.astype(dtype)
    return [high, (x - high.astype(jnp.float32)).astype(dtype)]


def panels(cut: Layout) -> list[tuple[slice, range]]:
    """Lanes of a tile's panels, and the heads in each."""
    per, width = max(1, LANES // cut.head_dim), max(LANES, cut.head_dim)
    return [(slice(i * width, (i + 1) * width), range(i * per, (i + 1) * per)) for i in range(cut.heads // per)]


def own(cut: Layout, head: int, x: Float[Array, "m lanes"], other: Any = 0) -> Float[Array, "m lanes"]:
    """A panel with `other` in place of what is not of this head."""
    if cut.head_dim >= LANES:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane // cut.head_dim == head % (LANES // cut.head_dim), x, other)


def spread(cut: Layout, columns: Float[Array, "m heads"]) -> Float[Array, "m width"]:
    """Each head's column over its lanes."""
    made = []
    for lanes, heads in panels(cut):
        shape = columns.shape[0], lanes.stop - lanes.start
        panel = jnp.broadcast_to(columns[:, heads[0] : heads[0] + 1], shape)
        for head in heads[1:]:
            panel = own(cut, head, jnp.broadcast_to(columns[:, head : head + 1], shape), panel)
        made.append(panel)
    return jnp.concatenate(made, axis=1)


def sums_of_heads(cut: Layout, x: Float[Array, "m width"]) -> list[Float[Array, "m 1"]]:
    """Over each head's lanes."""
    return [
        jnp.sum(own(cut, head, x[:, lanes]), axis=1, keepdims=True) for lanes, heads in panels(cut) for head in heads
    ]
