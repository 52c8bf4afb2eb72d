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


def _product(x: Array, w: Array) -> Array:
    # No preferred_element_type: asked for float32 results of narrow operands, JAX transposes into products of a float32
    # cotangent with a narrow weight, several times slower. Sums are float32 anyway (on a CPU: tested).
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.matmul(x, w, precision=precision)
