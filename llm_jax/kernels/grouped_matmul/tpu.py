"""TPU kernels (Mosaic): a grid over the tiles of each group, known only at run time, and tiles of the weights."""

import math
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.platform import tpu_refusal
from llm_jax.kernels.tiles import tiles

LONGEST = 16384
"""Columns of rows that are taken from tokens, of which a tile keeps them all."""
TAKEN_BYTES = 16 * 2**20
"""Of VMEM, for two such tiles."""


@dataclass(frozen=True)
class Tiles:
    """Rows, and the two dimensions of the weights as the product sees them: summed over, and made."""

    rows: int
    summed: int
    made: int


def supports(spec: GroupedSpec, platform: str) -> str | None:
    """bfloat16 and float32 of any shape, but for rows that are taken from tokens and longer than `LONGEST`."""
    if refusal := tpu_refusal(platform):
        return refusal
    if spec.dtype == "float16":
        return "TPUs multiply bfloat16 and float32, not float16"
    if 0 in (spec.rows, spec.groups, spec.inputs, spec.outputs):
        return "there is nothing to multiply"
    if spec.tokens is not None and spec.inputs > LONGEST:
        return f"VMEM has no room for tiles of rows that are longer than {LONGEST:,} and taken from tokens"
    return None


def product(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "M N"]:
    """Rows of x, or those that `rows` takes from it, times the weights of their group, 0 behind the last group."""
    from llm_jax.kernels.grouped_matmul import tpu_product

    return tpu_product.rows_times(
        [x], [w], group_sizes, product_tiles(spec), transposed=False, name="llm_jax_grouped_matmul", rows=rows
    )


def input_gradient(
    spec: GroupedSpec, g: Float[Array, "M N"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M K"]:
    """Rows of g times the transposed weights of their group."""
    from llm_jax.kernels.grouped_matmul import tpu_product

    return tpu_product.rows_times(
        [g], [w], group_sizes, product_tiles(spec), transposed=True, name="llm_jax_grouped_matmul_input_gradient"
    )


def weight_gradient(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    g: Float[Array, "M N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "E K N"]:
    """Per group the sum over its rows of x ⊗ g, 0 of an empty one."""
    from llm_jax.kernels.grouped_matmul import tpu_weight_gradient

    return tpu_weight_gradient.sums_of_groups(x, g, group_sizes, gradient_tiles(spec), rows)


def product_tiles(spec: GroupedSpec) -> Tiles:
    """Tiles of the product and of the input gradient.

    A tile at the edge of a group is multiplied whole, so tiles are not larger than a group on average. The weights of
    a group stay in VMEM from tile to tile if one tile sums over the whole dimension.
    """
    summed, made = (4096, 1024) if spec.dtype == "bfloat16" else (1024, 512)
    default = Tiles(rows=taken_rows_of_a_tile(spec), summed=summed, made=made)
    return tiles("grouped_matmul", "tpu", dtype=spec.dtype, shape=f"product {shape_class(spec)}", default=default)


def gradient_tiles(spec: GroupedSpec) -> Tiles:
    """Tiles of the weight gradient: `made` in both dimensions of the weights, summed over rows."""
    default = Tiles(rows=rows_of_a_tile(spec), summed=0, made=1024 if spec.dtype == "bfloat16" else 512)
    return tiles(
        "grouped_matmul", "tpu", dtype=spec.dtype, shape=f"weight gradient {shape_class(spec)}", default=default
    )


def rows_of_a_tile(spec: GroupedSpec) -> int:
    """Not more than a group has on average."""
    return min(512, max(128, 2 ** int(math.log2(max(1, spec.rows // spec.groups)))))


def taken_rows_of_a_tile(spec: GroupedSpec) -> int:
    """Fewer of long rows that are taken from tokens: two tiles of whole rows are in VMEM."""
    rows = rows_of_a_tile(spec)
    if spec.tokens is None:
        return rows
    while rows > 64 and 2 * rows * spec.inputs * (4 if spec.dtype == "float32" else 2) > TAKEN_BYTES:
        rows //= 2
    return rows


def shape_class(spec: GroupedSpec) -> str:
    """As the tables of tile sizes name it."""
    return f"{rows_of_a_tile(spec)} rows{'' if spec.tokens is None else ' of tokens'}"
