"""A tile of logits inside a TPU kernel, and how values per token are laid out for it."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from llm_jax.kernels import mosaic_tpu
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.linear_cross_entropy.tpu import Tiles

LANES = 128
"""Values per token are columns of [tokens, 128]: a column of a tile broadcasts over its logits without a transpose."""


def logits(spec: LossSpec, hidden: Array, head: Array) -> Float[Array, "t v"]:
    """The logits of a tile."""
    made = spec.scale * mosaic_tpu.dot(hidden, head, 1, 0)
    return made if spec.softcap is None else spec.softcap * jnp.tanh(made / spec.softcap)


def columns(like: Array, tile: Any) -> Int[Array, "t v"]:
    """Numbers of the columns of the vocabulary in its `tile`-th tile."""
    return tile * like.shape[1] + lax.broadcasted_iota(jnp.int32, like.shape, 1)


def pack(values: dict[str, Array]) -> Float[Array, "M lanes"]:
    """Values per token as the first columns, in their order; integers below 2^24 stay exact."""
    packed = jnp.stack([x.astype(jnp.float32) for x in values.values()], axis=1)
    return jnp.pad(packed, ((0, 0), (0, LANES - len(values))))


def column(packed: Any, names: tuple[str, ...], name: str) -> Float[Array, "t 1"]:
    """One of the values per token of a packed tile."""
    i = names.index(name)
    return packed[:, i : i + 1]


def specs_by_tokens(spec: LossSpec, tiles: Tiles, lanes: int) -> list[pl.BlockSpec]:
    """Of hidden, head and [M, lanes], for a grid (tiles of tokens, tiles of the vocabulary) whose first prefetched
    scalar is the number of tiles of tokens to work on. The steps behind them read nothing.

    The grid itself stays static, as its dimension of tokens is split between the cores of a chip.
    """
    vocab = min(tiles.vocab, spec.vocab)
    last = pl.cdiv(spec.vocab, vocab) - 1

    def of_tokens(t: Any, v: Any, blocks: Any) -> tuple[Any, ...]:
        return jnp.minimum(t, blocks[0] - 1), 0

    def of_columns(t: Any, v: Any, blocks: Any) -> tuple[Any, ...]:
        return 0, jnp.where(t < blocks[0], v, last)

    return [
        pl.BlockSpec((tiles.tokens, spec.width), of_tokens),
        pl.BlockSpec((spec.width, vocab), of_columns),
        pl.BlockSpec((tiles.tokens, lanes), of_tokens),
    ]
