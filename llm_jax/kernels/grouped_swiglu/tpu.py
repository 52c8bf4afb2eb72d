"""TPU kernels (Mosaic): `grouped_matmul`'s, with two products side by side in VMEM that become one as it is stored, and
with the sum of two products.
"""

from jaxtyping import Array, Float, Int

from llm_jax.kernels import swiglu as numbers
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.grouped_matmul.tpu import Tiles, rows_of_a_tile, shape_class, taken_rows_of_a_tile
from llm_jax.kernels.grouped_matmul.tpu import supports as supports
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
    from llm_jax.kernels.grouped_matmul import tpu_product

    def join(gate: Array, up: Array) -> Array:
        return numbers.activated(*(part.astype(x.dtype) for part in (gate, up)))

    weights = (4096, 512) if spec.dtype == "bfloat16" else (1024, 256)
    sizes = _tiles(spec, "product", Tiles(taken_rows_of_a_tile(spec), *weights))
    return tpu_product.rows_times(
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
    from llm_jax.kernels.grouped_matmul import tpu_product

    weights = (2048, 1024) if spec.dtype == "bfloat16" else (512, 512)
    sizes = _tiles(spec, "input gradient", Tiles(rows_of_a_tile(spec), *weights))
    return tpu_product.rows_times(
        [d_gate, d_up], [gate, up], group_sizes, sizes, transposed=True, name="llm_jax_grouped_swiglu_input_gradient"
    )


def _tiles(spec: GroupedSpec, kernel: str, default: Tiles) -> Tiles:
    """Half as many weights of each kind as `grouped_matmul` takes of its one."""
    return tiles("grouped_swiglu", "tpu", dtype=spec.dtype, shape=f"{kernel} {shape_class(spec)}", default=default)
