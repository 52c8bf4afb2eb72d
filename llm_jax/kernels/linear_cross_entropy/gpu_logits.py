"""A tile of logits inside a GPU kernel: its product, and vectors along its rows."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels import mosaic_gpu
from llm_jax.kernels.linear_cross_entropy.gpu import HEIGHT, Tiles
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.mosaic_gpu import DEPTH, ROWS, WARPGROUP

PART = 32


def operands(hidden: Array, head: Array, tiles: Tiles) -> tuple[Array, Array]:
    """In whole steps and columns of tiles."""
    return mosaic_gpu.padded(hidden, (HEIGHT, DEPTH)), mosaic_gpu.padded(head, (DEPTH, tiles.width))


def product(row: Any, column: Any, width: int, tiles: Tiles) -> mosaic_gpu.Product:
    """hidden @ head, of a tile."""

    def multiply(step: Any, acc: Any, hidden: Any, head: Any) -> None:
        plgpu.wgmma(acc, hidden.at[mosaic_gpu.half()], head)

    return mosaic_gpu.Product(
        operands=(
            mosaic_gpu.Operand((HEIGHT, DEPTH), lambda k: (row, k)),
            mosaic_gpu.Operand((DEPTH, tiles.width), lambda k: (k, column)),
        ),
        width=tiles.width,
        steps=width // DEPTH,
        stages=tiles.stages,
        multiply=multiply,
    )


def finished(spec: LossSpec, tile: Float[Array, "t v"]) -> Float[Array, "t v"]:
    """Logits from products."""
    made = tile if spec.scale == 1.0 else spec.scale * tile
    return made if spec.softcap is None else spec.softcap * jnp.tanh(made / spec.softcap)


def tokens(row: Any) -> Any:
    """Those of the calling warpgroup, in a tile of this row."""
    return pl.ds(row * HEIGHT + lax.axis_index(WARPGROUP) * ROWS, ROWS)


def vector(ref: Any) -> Float[Array, " t"]:
    """A value for each row of a tile, from GMEM."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def along_rows(vector: Float[Array, " t"], like: Array) -> Float[Array, "t v"]:
    """The same value in each column."""
    return lax.broadcast_in_dim(vector, like.shape, [0])


def parts(tile: Float[Array, "t v"], column: Any) -> list[tuple[Float[Array, "t part"], Any]]:
    """A tile of this column in narrower parts, each with the number of its first column of the vocabulary.

    The registers that a whole tile leaves hold the intermediate results of one part."""
    return [(tile[:, at : at + PART], column * tile.shape[1] + at) for at in range(0, tile.shape[1], PART)]


def offsets(part: Float[Array, "t part"]) -> Int[Array, "t part"]:
    """Numbers of its columns after the first. What they are compared with is shifted to that, so that one set of
    registers holds them for all parts."""
    return plgpu.broadcasted_iota(jnp.int32, part.shape, 1, layout=plgpu.Layout.WGMMA)
