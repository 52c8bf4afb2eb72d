"""The small modules: projection, norm, embedding, attention, feed-forward."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llm_jax import kernels
from llm_jax.models.cache import Cache, Meta
from llm_jax.models.config import ModelConfig
from llm_jax.models.parameter import matrix, vector
from llm_jax.models.remat import PROJECTION
from llm_jax.models.rope import Rotation, rotate
from llm_jax.models.weights import gathered
from llm_jax.sharding import axis_index, axis_sum, constrain, on_shards

RESIDUAL = ("batch", "length", "embed")


class Linear(nnx.Module):
    """`x @ weight + bias`. The weight is an array or a `QuantizedArray`; `kernels.matmul` reads either."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str, str], *, bias: bool, std: float):
        self.weight = matrix(inputs, outputs, axes, std)
        self.bias = vector(outputs, axes[1], "zeros") if bias else None

    @gathered
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = checkpoint_name(kernels.matmul(x, self.weight.get_value()), PROJECTION)
        return y if self.bias is None else y + self.bias.get_value()


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
    """Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4. Statistics in float32; the result has the dtype of `x`."""

    def __init__(self, size: int, eps: float):
        self.weight = vector(size, "norm", "ones")
        self.eps = eps

    @gathered
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return _rms_norm(x, self.weight.get_value(), self.eps)


class Embedding(nnx.Module):
    """Token vectors `[V, D]`. Under a tensor axis each shard looks up its own rows and the parts are added."""

    def __init__(self, vocab_size: int, hidden_size: int, std: float):
        self.weight = matrix(vocab_size, hidden_size, ("vocab", "embed"), std)

    @gathered
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        def lookup(weight: Array, tokens: Array) -> Array:
            row = tokens - axis_index("vocab") * weight.shape[0]
            here = (row >= 0) & (row < weight.shape[0])
            return axis_sum(jnp.where(here[..., None], weight[jnp.where(here, row, 0)], 0), "vocab")

        return on_shards(lookup, (("vocab", "embed"), ("batch", "length")), RESIDUAL)(self.weight.get_value(), tokens)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions.

    Of its cache it knows `attend(q, k, v, meta)` only.
    """

    def __init__(self, config: ModelConfig):
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        D, N, K = config.hidden_size, config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim  # type: ignore[operator]
        options = {"bias": config.attention_bias, "std": config.init_std}
        self.q = Linear(D, N, ("embed", "heads"), **options)
        self.k = Linear(D, K, ("embed", "kv_heads"), **options)
        self.v = Linear(D, K, ("embed", "kv_heads"), **options)
        self.o = Linear(N, D, ("heads", "embed"), **options)

    def __call__(
        self, x: Float[Array, "B T D"], rope: Rotation, cache: Cache, meta: Meta
    ) -> tuple[Float[Array, "B T D"], Cache]:
        def heads(y: Array, name: str) -> Array:
            return constrain(y.reshape(*y.shape[:2], -1, self.head_dim), ("batch", "length", name, None))

        q, k, v = heads(self.q(x), "heads"), heads(self.k(x), "kv_heads"), heads(self.v(x), "kv_heads")
        out, cache = cache.attend(rotate(q, rope), rotate(k, rope), v, meta)
        return self.o(out.reshape(*x.shape[:2], -1)), cache


@jax.custom_vjp
def _gate(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """`silu(gate) * up`. Its backward pass keeps these two; as JAX derives it, five arrays of the greatest width."""
    return jax.nn.silu(gate) * up


def _gate_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gate(gate, up), (gate, up)


def _gate_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up, g32 = (x.astype(jnp.float32) for x in (*saved, g))
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = g32 * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    # Each of the two makes the sigmoid for itself; shared, it is an array that is written and read again.
    gate = jax.lax.optimization_barrier(gate)
    return d_gate.astype(g.dtype), (g32 * gate * jax.nn.sigmoid(gate)).astype(g.dtype)


_gate.defvjp(_gate_forward, _gate_backward)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig):
        D, F = config.hidden_size, config.intermediate_size
        options = {"bias": config.mlp_bias, "std": config.init_std}
        self.gate = Linear(D, F, ("embed", "mlp"), **options)
        self.up = Linear(D, F, ("embed", "mlp"), **options)
        self.down = Linear(F, D, ("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        inner = _gate(self.gate(x), self.up(x))
        return self.down(constrain(inner, ("batch", "length", "mlp")))
