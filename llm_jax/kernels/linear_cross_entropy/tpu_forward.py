"""Statistics of logits with running maxima and sums: grid (tiles of tokens, tiles of the vocabulary)."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes, mosaic_tpu
from llm_jax.kernels.linear_cross_entropy.partials import statistic
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.linear_cross_entropy.tpu import Tiles
from llm_jax.kernels.linear_cross_entropy.tpu_logits import LANES, columns, logits, specs_by_tokens

# What runs over the vocabulary, in columns of the output: with w = exp(z - top), `total` Σ w, `weighted` Σ w z,
# `squares` Σ w².
START = {"top": -jnp.inf, "total": 0.0}
NEEDS = {
    "expected_logit": {"weighted": 0.0},
    "sum_logit": {"sum": 0.0},
    "lse2": {"squares": 0.0},
    "argmax": {"best": 0.0},
    "target_logit": {"target": 0.0},
}


def statistics(
    spec: LossSpec,
    hidden: Float[Array, "M D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " M"],
    blocks: Int[Array, "1"],
    tiles: Tiles,
) -> dict[str, Array]:
    """The statistics that `spec` names of the first `blocks` tiles of tokens; behind them, anything."""
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(hidden.shape[0] // tiles.tokens, pl.cdiv(spec.vocab, min(tiles.vocab, spec.vocab))),
        in_specs=specs_by_tokens(spec, tiles, lanes=1),
        out_specs=pl.BlockSpec((tiles.tokens, LANES), lambda t, v, blocks: (t, 0)),
    )
    call = pl.pallas_call(
        functools.partial(_kernel, spec=spec),
        grid_spec=grid_spec,
        out_shape=manual_axes.like(hidden, (hidden.shape[0], LANES), jnp.float32),
        compiler_params=mosaic_tpu.params("parallel", "arbitrary"),
        name="llm_jax_linear_cross_entropy",
    )
    packed = call(blocks, hidden, head, targets[:, None].astype(jnp.int32))
    made = {name: packed[:, i] for i, name in enumerate(spec.statistics)}
    return {name: x.astype(jnp.int32) if name == "argmax" else x for name, x in made.items()}


def _kernel(blocks_ref: Any, hidden_ref: Any, head_ref: Any, targets_ref: Any, out_ref: Any, *, spec: LossSpec) -> None:
    v = pl.program_id(1)
    state = START | {key: value for name in spec.statistics for key, value in NEEDS.get(name, {}).items()}

    @pl.when(v == 0)
    def _():
        for i, value in enumerate(state.values()):
            out_ref[:, i : i + 1] = jnp.full((out_ref.shape[0], 1), value, jnp.float32)

    @pl.when(pl.program_id(0) < blocks_ref[0])
    def _():
        before = {key: out_ref[:, i : i + 1] for i, key in enumerate(state)}
        z = logits(spec, hidden_ref[...], head_ref[...])
        after = _advance(spec, before, z, columns(z, v), targets_ref[...])
        for i, key in enumerate(state):
            out_ref[:, i : i + 1] = after[key]

    @pl.when(v == pl.num_programs(1) - 1)
    def _():
        done = {key: out_ref[:, i : i + 1] for i, key in enumerate(state)}
        for i, name in enumerate(spec.statistics):
            out_ref[:, i : i + 1] = statistic(name, done)


def _advance(
    spec: LossSpec, before: dict[str, Array], z: Float[Array, "t v"], column: Int[Array, "t v"], targets: Array
) -> dict[str, Array]:
    """The state with one more tile of logits in it."""
    finite = z
    if spec.vocab % z.shape[1]:  # Products of what lies behind the last column may be NaN.
        inside = column < spec.vocab
        z, finite = jnp.where(inside, z, -jnp.inf), jnp.where(inside, z, 0.0)
    largest = z.max(1, keepdims=True)
    top = jnp.maximum(before["top"], largest)
    shrink = jnp.exp(before["top"] - top)
    weights = jnp.exp(z - top)
    after = {"top": top, "total": before["total"] * shrink + weights.sum(1, keepdims=True)}
    if "weighted" in before:
        after["weighted"] = before["weighted"] * shrink + (weights * finite).sum(1, keepdims=True)
    if "squares" in before:
        after["squares"] = before["squares"] * shrink**2 + (weights * weights).sum(1, keepdims=True)
    if "sum" in before:
        after["sum"] = before["sum"] + finite.sum(1, keepdims=True)
    if "best" in before:
        # The first of the largest: an earlier tile keeps its own, unless this one has a larger.
        best = jnp.where(z == largest, column.astype(jnp.float32), spec.vocab - 1.0).min(1, keepdims=True)
        after["best"] = jnp.where(largest > before["top"], best, before["best"])
    if "target" in before:
        after["target"] = before["target"] + jnp.where(column == targets, finite, 0.0).sum(1, keepdims=True)
    return after
