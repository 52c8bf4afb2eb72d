"""Products in x's dtype with float32 sums. Codes of a quantized weight become x's dtype, exactly; scales come after."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels.matmul.quantized import QuantizedArray


def supports(spec: object, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def matmul(x: Float[Array, "*batch K"], w: Float[Array, "K M"] | QuantizedArray) -> Float[Array, "*batch M"]:
    """Result in x's dtype; quantized weights without gradient."""
    if isinstance(w, QuantizedArray):
        scales = jax.lax.stop_gradient(w.scales[0])
        return (_product(x, w.codes.astype(x.dtype)).astype(jnp.float32) * scales).astype(x.dtype)
    return _product(x, w)


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    # No preferred_element_type: asked for float32 results of narrow operands, JAX transposes into products of a float32
    # cotangent with a narrow weight, several times slower. Sums are float32 anyway (on a CPU: tested).
    return jnp.matmul(x, w, precision=_precision(x))


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w), (x, w)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """As JAX derives it, but for the order of the weight's gradient: g and x the other way round, then transposed, is
    a product of transposed copies on a CPU, at half the speed and on one core."""
    x, w = saved
    rows = tuple(range(x.ndim - 1))
    d_x = jax.lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())), precision=_precision(x))
    d_w = jax.lax.dot_general(x, g, ((rows, rows), ((), ())), precision=_precision(x))
    return d_x, d_w


_product.defvjp(_product_forward, _product_backward)


def _precision(x: Array) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
