"""GPU kernels (Mosaic GPU, sm_90a): persistent blocks over the tiles of each group, known only at run time."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.platform import hopper_refusal
from llm_jax.kernels.tiles import tiles


@dataclass(frozen=True)
class Tiles:
    """Tiles are 128 rows high."""

    width: int = 256
    """Columns of a tile."""
    stages: int = 4
    """Steps of 64 that are on their way from memory."""
    band: int = 8
    """Tiles above each other that are made before those beside them, for the L2 cache."""


def supports(spec: GroupedSpec, platform: str) -> str | None:
    """bfloat16 and float16 of any shape."""
    if refusal := hopper_refusal(platform):
        return refusal
    if spec.dtype == "float32":
        return "tensor cores multiply bfloat16 and float16, not float32"
    if 0 in (spec.rows, spec.groups, spec.inputs, spec.outputs):
        return "there is nothing to multiply"
    return None


def product(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "M N"]:
    """Rows of x, or those that `rows` takes from it, times the weights of their group, 0 behind the last group."""
    from llm_jax.kernels.grouped_matmul import gpu_product

    return gpu_product.rows_times(
        [x], [w], group_sizes, _tiles(spec, "product"), transposed=False, name="llm_jax_grouped_matmul", rows=rows
    )


def input_gradient(
    spec: GroupedSpec, g: Float[Array, "M N"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M K"]:
    """Rows of g times the transposed weights of their group."""
    from llm_jax.kernels.grouped_matmul import gpu_product

    return gpu_product.rows_times(
        [g], [w], group_sizes, _tiles(spec, "product"), transposed=True, name="llm_jax_grouped_matmul_input_gradient"
    )


def weight_gradient(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    g: Float[Array, "M N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "E K N"]:
    """Per group the sum over its rows of x ⊗ g, 0 of an empty one."""
    from llm_jax.kernels.grouped_matmul import gpu_weight_gradient

    return gpu_weight_gradient.sums_of_groups(x, g, group_sizes, _tiles(spec, "weight gradient"), rows)


def shape_class(spec: GroupedSpec) -> str:
    """As the tables of tile sizes name it."""
    groups = "many" if spec.rows < 1024 * spec.groups else "few"
    return f"{groups} groups{'' if spec.tokens is None else ', rows of tokens'}"


def _tiles(spec: GroupedSpec, kernel: str) -> Tiles:
    return tiles("grouped_matmul", "gpu", dtype=spec.dtype, shape=f"{kernel} {shape_class(spec)}", default=Tiles())
