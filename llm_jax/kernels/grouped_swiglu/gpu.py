"""GPU kernels (Mosaic GPU, sm_90a): `grouped_matmul`'s, with two tiles of products that become one as it is stored, and
with the sum of two products in one tile.
"""

from jaxtyping import Array, Float, Int

from llm_jax.kernels import swiglu as numbers
from llm_jax.kernels.grouped_matmul.gpu import Tiles, shape_class
from llm_jax.kernels.grouped_matmul.gpu import supports as supports
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.tiles import tiles


def swiglu(
    spec: GroupedSpec,
    x: Float[Array, "T K"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " M"] | None = None,
) -> Float[Array, "M N"]:
    """silu(rows times gate) * (rows times up), 0 behind the last group."""
    from llm_jax.kernels.grouped_matmul import gpu_product

    def join(gate: Array, up: Array) -> Array:
        return numbers.activated(*(part.astype(x.dtype) for part in (gate, up)))

    # Two tiles of 128 columns take the registers of one of 256.
    sizes = _tiles(spec, "product", Tiles(width=128))
    return gpu_product.rows_times(
        [x], [gate, up], group_sizes, sizes, transposed=False, name="llm_jax_grouped_swiglu", join=join, rows=rows
    )


def input_gradient(
    spec: GroupedSpec,
    d_gate: Float[Array, "M N"],
    d_up: Float[Array, "M N"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
) -> Float[Array, "M K"]:
    """Rows of both gradients times the transposed weights of their group, added up in float32."""
    from llm_jax.kernels.grouped_matmul import gpu_product

    # A step of the pipeline has blocks of both products: as many bytes under way in half as many steps.
    sizes = _tiles(spec, "input gradient", Tiles(stages=2))
    return gpu_product.rows_times(
        [d_gate, d_up], [gate, up], group_sizes, sizes, transposed=True, name="llm_jax_grouped_swiglu_input_gradient"
    )


def _tiles(spec: GroupedSpec, kernel: str, default: Tiles) -> Tiles:
    return tiles("grouped_swiglu", "gpu", dtype=spec.dtype, shape=f"{kernel} {shape_class(spec)}", default=default)
