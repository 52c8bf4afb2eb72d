"""Gradients of the logits of a chunk of tokens, in 16 bits: the product is made again, and its tiles are stored."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from llm_jax.kernels import mosaic_gpu
from llm_jax.kernels.linear_cross_entropy import gpu_logits
from llm_jax.kernels.linear_cross_entropy.gpu import HEIGHT, Tiles
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.mosaic_gpu import ROWS, WARPGROUP, WARPGROUPS


def rows_of(targets: Array, made: dict[str, Array], d: dict[str, Array]) -> dict[str, Array]:
    """Values per token, with which the gradient of a logit z is, p being the softmax,
    p (constant + slope z) + twice exp(2z - lse2) + sum + (at the target) hit."""
    rows = {"lse": made["lse"], "constant": d["lse"]}
    if "expected_logit" in d:
        rows["constant"] = d["lse"] + d["expected_logit"] * (1.0 - made["expected_logit"])
        rows["slope"] = d["expected_logit"]
    if "lse2" in d:
        rows |= {"lse2": made["lse2"], "twice": 2.0 * d["lse2"]}
    if "sum_logit" in d:
        rows["sum"] = d["sum_logit"]
    if "target_logit" in d:
        rows |= {"target": targets.astype(jnp.int32), "hit": d["target_logit"]}
    return rows


def logit_gradient(
    spec: LossSpec, hidden: Float[Array, "M D"], head: Float[Array, "D V"], rows: dict[str, Array], tiles: Tiles
) -> Float[Array, "M V"]:
    """Of the products hidden @ head, in their dtype."""
    tokens, vocab = hidden.shape[0], head.shape[1]
    hidden, head = gpu_logits.operands(hidden, head, tiles)
    shape = hidden.shape[0], head.shape[1]
    most, columns = shape[0] // HEIGHT, shape[1] // tiles.width
    items = mosaic_gpu.in_bands(jnp.int32(most), most, columns, tiles.band)
    kernel = mosaic_gpu.launch(
        functools.partial(_kernel, spec=spec, tiles=tiles, names=tuple(rows)),
        jax.ShapeDtypeStruct(shape, hidden.dtype),
        tiles=items.shape[0],
        name="llm_jax_linear_cross_entropy_logit_gradient",
    )
    return kernel(items, hidden, head, *rows.values())[:tokens, :vocab]


def _kernel(
    items_ref: Any, hidden_ref: Any, head_ref: Any, *refs: Any, spec: LossSpec, tiles: Tiles, names: tuple[str, ...]
) -> None:
    rows, out_ref = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    columns = head_ref.shape[1] // tiles.width

    def scope(pipeline: Any, stored: Any) -> None:
        wg = lax.axis_index(WARPGROUP)

        @mosaic_gpu.share(items_ref.shape[0])
        def _(i: Any) -> None:
            row, column = lax.div(items_ref[i], columns), lax.rem(items_ref[i], columns)

            def finish(tile: Array) -> None:
                tokens = gpu_logits.tokens(row)
                own = {name: ref.at[tokens] for name, ref in rows.items()}
                for i, (part, first) in enumerate(gpu_logits.parts(tile, column)):
                    width = part.shape[1]
                    to = out_ref.at[tokens, pl.ds(column * tiles.width + i * width, width)]
                    mosaic_gpu.store(to, stored.at[wg], _gradient(spec, part, first, own), i)

            made = gpu_logits.product(row, column, hidden_ref.shape[1], tiles)
            made.run(hidden_ref, head_ref, allocations=pipeline, finish=finish)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(
        scope,
        pipeline=gpu_logits.product(0, 0, hidden_ref.shape[1], tiles).allocations(hidden_ref, head_ref),
        stored=mosaic_gpu.matrices((WARPGROUPS, 2, ROWS, gpu_logits.PART), out_ref.dtype),
        collective_axes=WARPGROUP,
    )


def _gradient(spec: LossSpec, part: Float[Array, "t v"], first: Any, rows: dict[str, Any]) -> Float[Array, "t v"]:
    z = gpu_logits.finished(spec, part)
    # Loaded for every part: vectors that are kept from part to part are spilled.
    vectors = {name: gpu_logits.vector(ref) for name, ref in rows.items()}
    of = {name: functools.partial(gpu_logits.along_rows, vector, z) for name, vector in vectors.items()}
    per_prob = of["constant"]()
    if "slope" in of:
        per_prob = per_prob + of["slope"]() * z
    gradient = jnp.exp(z - of["lse"]()) * per_prob
    if "twice" in of:
        gradient += of["twice"]() * jnp.exp(2.0 * z - of["lse2"]())
    if "sum" in of:
        gradient += of["sum"]()
    if "hit" in of:
        at_target = gpu_logits.offsets(z) == gpu_logits.along_rows(vectors["target"] - first, z)
        gradient += jnp.where(at_target, of["hit"](), 0.0)
    if spec.softcap is not None:
        gradient *= 1.0 - (z * (1.0 / spec.softcap)) ** 2
    return gradient if spec.scale == 1.0 else spec.scale * gradient
