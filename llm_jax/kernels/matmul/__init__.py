"""The product of every projection: with an array, or with a weight in a packed number format."""

from jaxtyping import Array, Float

from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.matmul import reference, xla
from llm_jax.kernels.matmul.quantized import QuantizedArray as QuantizedArray
from llm_jax.kernels.matmul.quantized import dequantize as dequantize
from llm_jax.kernels.matmul.quantized import quantize as quantize
from llm_jax.kernels.matmul.spec import matmul_spec

OP = Op("matmul", matmul_spec, {"xla": xla, "reference": reference}, order=("xla",))


def matmul(
    x: Float[Array, "*batch K"], w: Float[Array, "K M"] | QuantizedArray, *, implementation: str | None = None
) -> Float[Array, "*batch M"]:
    """x @ w in x's dtype with float32 sums; float32 x means precision HIGHEST.

    An array w has x's dtype. A `QuantizedArray` goes with any, and is frozen: gradients flow to x alone.

    Raises:
        ArgumentError: shapes, dtypes or a format that do not fit, or an unknown implementation.
    """
    name = choose(OP, matmul_spec(x, w), implementation)
    return OP.implementations[name].matmul(x, w)
