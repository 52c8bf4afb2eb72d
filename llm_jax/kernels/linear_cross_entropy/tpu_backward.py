"""The two gradients, each summed over tiles of logits that are made again: over the vocabulary, and over the tokens."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.linear_cross_entropy.tpu import Tiles
from llm_jax.kernels.linear_cross_entropy.tpu_logits import LANES, column, columns, logits, pack, specs_by_tokens


def hidden_gradient(
    spec: LossSpec,
    tiles: Tiles,
    blocks: Int[Array, "1"],
    head: Float[Array, "D V"],
    hidden: Float[Array, "M D"],
    targets: Int[Array, " M"],
    saved: dict[str, Array],
    cotangents: dict[str, Array],
) -> Float[Array, "M D"]:
    """For the first `blocks` tiles of tokens; behind them, anything."""
    names, packed = _pack(targets, saved, cotangents)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(hidden.shape[0] // tiles.tokens, pl.cdiv(spec.vocab, min(tiles.vocab, spec.vocab))),
        in_specs=specs_by_tokens(spec, tiles, lanes=LANES),
        out_specs=pl.BlockSpec((tiles.tokens, spec.width), lambda t, v, blocks: (t, 0)),
        scratch_shapes=[pltpu.VMEM((tiles.tokens, spec.width), jnp.float32)],
    )
    call = pl.pallas_call(
        functools.partial(_hidden_kernel, spec=spec, names=names),
        grid_spec=grid_spec,
        out_shape=manual_axes.like(hidden, hidden.shape, hidden.dtype),
        compiler_params=mosaic_tpu.params("parallel", "arbitrary"),
        name="llm_jax_linear_cross_entropy_hidden_gradient",
    )
    return call(blocks, hidden, head, packed)


def head_gradient(
    spec: LossSpec,
    tiles: Tiles,
    blocks: Int[Array, "1"],
    head: Float[Array, "D V"],
    hidden: Float[Array, "M D"],
    targets: Int[Array, " M"],
    saved: dict[str, Array],
    cotangents: dict[str, Array],
) -> Float[Array, "D V"]:
    """The sum over the first `blocks` tiles of tokens, in the head's dtype before it was cast."""
    vocab = min(tiles.vocab, spec.vocab)
    names, packed = _pack(targets, saved, cotangents)
    call = pl.pallas_call(
        functools.partial(_head_kernel, spec=spec, names=names),
        grid=(pl.cdiv(spec.vocab, vocab), blocks[0]),
        in_specs=[
            pl.BlockSpec((tiles.tokens, spec.width), lambda v, t: (t, 0)),
            pl.BlockSpec((spec.width, vocab), lambda v, t: (0, v)),
            pl.BlockSpec((tiles.tokens, LANES), lambda v, t: (t, 0)),
        ],
        out_specs=pl.BlockSpec((spec.width, vocab), lambda v, t: (0, v)),
        out_shape=manual_axes.like(hidden, head.shape, spec.head_dtype),
        scratch_shapes=[pltpu.VMEM((vocab, spec.width), jnp.float32)],
        compiler_params=mosaic_tpu.params("parallel", "arbitrary"),
        name="llm_jax_linear_cross_entropy_head_gradient",
    )
    return call(hidden, head, packed)


def _pack(targets: Array, saved: dict[str, Array], cotangents: dict[str, Array]) -> tuple[tuple[str, ...], Array]:
    values = {"target": jnp.clip(targets, -1, 2**24)} | saved | {f"d_{name}": g for name, g in cotangents.items()}
    return tuple(values), pack(values)


def _hidden_kernel(
    blocks_ref: Any,
    hidden_ref: Any,
    head_ref: Any,
    packed_ref: Any,
    out_ref: Any,
    total_ref: Any,
    *,
    spec: LossSpec,
    names: tuple[str, ...],
) -> None:
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(pl.program_id(0) < blocks_ref[0])
    def _():
        head = head_ref[...]
        if spec.vocab % head.shape[1]:
            head = mosaic_tpu.keep(head, axis=1, start=v * head.shape[1], begin=0, end=spec.vocab)
        d_logits = _logit_gradient(spec, hidden_ref[...], head, packed_ref, names, v)
        total_ref[...] += mosaic_tpu.dot(d_logits, head, 1, 1)

    @pl.when(v == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _head_kernel(
    hidden_ref: Any,
    head_ref: Any,
    packed_ref: Any,
    out_ref: Any,
    total_ref: Any,
    *,
    spec: LossSpec,
    names: tuple[str, ...],
) -> None:
    t = pl.program_id(1)

    @pl.when(t == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    d_logits = _logit_gradient(spec, hidden_ref[...], head_ref[...], packed_ref, names, pl.program_id(0))
    # Summed transposed: the gradient of a tile of logits is turned each time, not the wider tile of hidden.
    total_ref[...] += mosaic_tpu.dot(d_logits, hidden_ref[...], 0, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = total_ref[...].T.astype(out_ref.dtype)


def _logit_gradient(
    spec: LossSpec, hidden: Array, head: Array, packed_ref: Any, names: tuple[str, ...], tile: Any
) -> Float[Array, "t v"]:
    """Of the product hidden @ head, in hidden's dtype. With p the softmax: d lse = p, d expected =
    p (1 + z - expected), d lse2 = 2 softmax(2z), d sum = 1."""
    z = logits(spec, hidden, head)
    of = functools.partial(column, packed_ref, names)
    per_prob = of("d_lse")
    if "d_expected_logit" in names:
        per_prob = per_prob + of("d_expected_logit") * (1.0 + z - of("expected_logit"))
    gradient = jnp.exp(z - of("lse")) * per_prob
    if "d_lse2" in names:
        gradient += of("d_lse2") * 2.0 * jnp.exp(2.0 * z - of("lse2"))
    if "d_sum_logit" in names:
        gradient += of("d_sum_logit")
    number = columns(z, tile)
    if "d_target_logit" in names:
        gradient += jnp.where(number == of("target").astype(jnp.int32), of("d_target_logit"), 0.0)
    if spec.softcap is not None:
        gradient *= 1.0 - (z / spec.softcap) ** 2
    if spec.vocab % z.shape[1]:
        gradient = jnp.where(number < spec.vocab, gradient, 0.0)
    return (spec.scale * gradient).astype(hidden.dtype)
