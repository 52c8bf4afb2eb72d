"""Statistics of logits: each tile gives its own maximum and sums, which XLA combines over the vocabulary."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llm_jax.kernels import mosaic_gpu
from llm_jax.kernels.linear_cross_entropy import gpu_logits
from llm_jax.kernels.linear_cross_entropy.gpu import HEIGHT, Tiles
from llm_jax.kernels.linear_cross_entropy.gpu_logits import PART
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.mosaic_gpu import WARPGROUP

# What a tile gives of each token: with w = exp(z - top), `total` Σ w, `weighted` Σ w z, `squares` Σ w².
NEEDS = {
    "expected_logit": ("weighted",),
    "sum_logit": ("sum",),
    "lse2": ("squares",),
    "argmax": ("best",),
    "target_logit": ("target",),
}


def statistics(
    spec: LossSpec,
    hidden: Float[Array, "M D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " M"],
    blocks: Int[Array, ""],
    tiles: Tiles,
) -> dict[str, Array]:
    """The statistics that `spec` names of the first `blocks` tiles of tokens; behind them, anything."""
    hidden, head = gpu_logits.operands(hidden, head, tiles)
    most, columns = hidden.shape[0] // HEIGHT, head.shape[1] // tiles.width
    items = mosaic_gpu.in_bands(blocks, most, columns, tiles.band)
    keys = ("top", "total", *(key for name in spec.statistics for key in NEEDS.get(name, ())))
    part = jax.ShapeDtypeStruct((columns, hidden.shape[0]), jnp.float32)
    kernel = mosaic_gpu.launch(
        functools.partial(_kernel, spec=spec, tiles=tiles, keys=keys),
        [part] * len(keys),
        tiles=items.shape[0],
        name="llm_jax_linear_cross_entropy",
    )
    parts = kernel((blocks * columns)[None], items, targets.astype(jnp.int32), hidden, head)
    return _combined(spec, dict(zip(keys, parts, strict=True)))


def _kernel(
    count_ref: Any,
    items_ref: Any,
    targets_ref: Any,
    hidden_ref: Any,
    head_ref: Any,
    *out_refs: Any,
    spec: LossSpec,
    tiles: Tiles,
    keys: tuple[str, ...],
) -> None:
    columns = head_ref.shape[1] // tiles.width

    def scope(pipeline: Any) -> None:
        @mosaic_gpu.share(count_ref[0])
        def _(i: Any) -> None:
            row, column = lax.div(items_ref[i], columns), lax.rem(items_ref[i], columns)

            def finish(tile: Array) -> None:
                tokens = gpu_logits.tokens(row)
                made = _reduced(spec, keys, tile, column, targets_ref.at[tokens])
                for key, ref in zip(keys, out_refs, strict=True):
                    plgpu.store(ref.at[column, tokens], made[key], optimized=False)

            made = gpu_logits.product(row, column, hidden_ref.shape[1], tiles)
            made.run(hidden_ref, head_ref, allocations=pipeline, finish=finish)

    allocations = gpu_logits.product(0, 0, hidden_ref.shape[1], tiles).allocations(hidden_ref, head_ref)
    pl.run_scoped(scope, pipeline=allocations, collective_axes=WARPGROUP)


def _reduced(
    spec: LossSpec, keys: tuple[str, ...], tile: Float[Array, "t v"], column: Any, targets_ref: Any
) -> dict[str, Float[Array, " t"]]:
    ragged = bool(spec.vocab % tile.shape[1])
    parts = [(gpu_logits.finished(spec, part), first) for part, first in gpu_logits.parts(tile, column)]
    if ragged:
        parts = [(jnp.where(gpu_logits.offsets(z) < spec.vocab - first, z, -jnp.inf), first) for z, first in parts]
    top = functools.reduce(jnp.maximum, (z.max(1) for z, _ in parts))
    target = gpu_logits.vector(targets_ref) if "target" in keys else None
    made: dict[str, Array] = {"top": top}

    def add(key: str, values: Callable[[], Array]) -> None:
        if key in keys:
            made[key] = made[key] + values().sum(1) if key in made else values().sum(1)

    for i, (z, first) in enumerate(parts):
        if i:  # part after part: side by side, they would need more registers than there are
            z, made = lax.optimization_barrier((z, made))
        highest = gpu_logits.along_rows(top, z)
        offset = gpu_logits.offsets(z)
        finite = jnp.where(offset < spec.vocab - first, z, 0.0) if ragged else z
        if target is not None:
            hit = offset == gpu_logits.along_rows(target - first, z)
            add("target", lambda hit=hit, finite=finite: jnp.where(hit, finite, 0.0))
        add("sum", lambda finite=finite: finite)
        if "best" in keys:
            best = jnp.where(z == highest, offset.astype(jnp.float32), float(PART)).min(1)
            best = jnp.where(best < PART, best + lax.convert_element_type(first, jnp.float32), spec.vocab - 1.0)
            made["best"] = jnp.minimum(made["best"], best) if "best" in made else best
        weights = jnp.exp(z - highest)
        add("total", lambda weights=weights: weights)
        add("weighted", lambda weights=weights, finite=finite: weights * finite)
        add("squares", lambda weights=weights: weights * weights)
    return made


def _combined(spec: LossSpec, parts: dict[str, Float[Array, "columns M"]]) -> dict[str, Array]:
    top = parts["top"].max(0)
    shrink = jnp.exp(parts["top"] - top)
    total = (parts["total"] * shrink).sum(0)
    every = {
        "target_logit": lambda: parts["target"].sum(0),
        "lse": lambda: top + jnp.log(total),
        "expected_logit": lambda: (parts["weighted"] * shrink).sum(0) / total,
        "sum_logit": lambda: parts["sum"].sum(0),
        "lse2": lambda: 2.0 * top + jnp.log((parts["squares"] * shrink**2).sum(0)),
        "argmax": lambda: jnp.where(parts["top"] == top, parts["best"], spec.vocab - 1).min(0).astype(jnp.int32),
        "max": lambda: top,
    }
    return {name: every[name]() for name in spec.statistics}
