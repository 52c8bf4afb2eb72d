"""The product in float32, of a weight written out in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels.matmul.quantized import QuantizedArray, dequantize


def supports(spec: object, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def matmul(x: Float[Array, "*batch K"], w: Float[Array, "K M"] | QuantizedArray) -> Float[Array, "*batch M"]:
    """Result in x's dtype; differentiated by JAX, quantized weights without gradient."""
    weight = jax.lax.stop_gradient(dequantize(w)) if isinstance(w, QuantizedArray) else w.astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)
