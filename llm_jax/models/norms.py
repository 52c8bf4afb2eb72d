"""Norms of the residual stream and of heads. Statistics in float32; results have the dtype of the input."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llm_jax.models.config import ModelConfig
from llm_jax.models.parameter import vector
from llm_jax.models.weights import gathered


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    x32 = x.astype(jnp.float32)
    return (x32 * _rms_scale(x32, eps) * weight.astype(jnp.float32)).astype(x.dtype)


def _rms_scale(x32: Array, eps: float) -> Float[Array, "... 1"]:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _rms_norm_forward(x: Array, weight: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return _rms_norm(x, weight, eps), (x, weight)


def _rms_norm_backward(eps: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """With x̂ = x / rms: dx = (g w - x̂ mean(g w x̂)) / rms, dw = Σ g x̂. Two numbers a row, then one pass."""
    x, weight = saved
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    weighted = g32 * weight.astype(jnp.float32)
    scale = _rms_scale(x32, eps)
    along = scale**3 * jnp.mean(weighted * x32, axis=-1, keepdims=True)
    scale, along = jax.lax.optimization_barrier((scale, along))
    d_weight = jnp.sum(g32 * (x32 * scale), axis=tuple(range(x.ndim - 1)))
    return (weighted * scale - x32 * along).astype(x.dtype), d_weight.astype(weight.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(nnx.Module):
    """Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.

    `offset`: weights are stored less 1, so that decay and a zero start leave the norm alone (Gemma).
    """

    def __init__(self, size: int, eps: float, *, offset: bool = False, axis: str = "norm"):
        self.weight = vector(size, axis, "zeros" if offset else "ones")
        self.eps, self.offset = eps, offset

    @gathered
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        weight = self.weight.get_value()
        return _rms_norm(x, 1.0 + weight.astype(jnp.float32) if self.offset else weight, self.eps)


def plain_norm(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """RMSNorm without weights."""
    x32 = x.astype(jnp.float32)
    return (x32 * _rms_scale(x32, eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Ba et al. 2016 (arXiv:1607.06450), eq. 4; without a bias where the model has none (Cohere)."""

    def __init__(self, size: int, eps: float, *, bias: bool):
        self.weight = vector(size, "norm", "ones")
        self.bias = vector(size, "norm", "zeros") if bias else None
        self.eps = eps

    @gathered
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        y = centred * scale * self.weight.get_value().astype(jnp.float32)
        return (y if self.bias is None else y + self.bias.get_value().astype(jnp.float32)).astype(x.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig, size: int | None = None) -> Norm:
    """The model's kind of norm, of the residual stream's width or another."""
    size = config.hidden_size if size is None else size
    if config.norm in ("rms", "rms_offset"):
        return RMSNorm(size, config.norm_eps, offset=config.norm == "rms_offset")
    return LayerNorm(size, config.norm_eps, bias=config.norm == "layer")
