"""The smallest modules: projection, embedding, a bias alone."""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llm_jax import kernels
from llm_jax.models.parameter import matrix, vector
from llm_jax.models.remat import PROJECTION
from llm_jax.models.weights import gathered
from llm_jax.sharding import axis_index, axis_sum, on_shards

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

    def factors(self, x: Float[Array, "... I"]) -> tuple[Float[Array, "... E"], Float[Array, "E O"]]:
        """Two factors whose product is `x @ weight`, for who makes it in pieces; of weights that are in use."""
        return x, self.whole()

    def whole(self) -> Float[Array, "I O"]:
        """The matrix that the layer multiplies with; of weights that are in use."""
        return self.weight.get_value()


class Embedding(nnx.Module):
    """Token vectors `[V, D]`. Under a tensor axis each shard looks up its own rows and the parts are added."""

    def __init__(self, vocab_size: int, hidden_size: int, std: float):
        self.weight = matrix(vocab_size, hidden_size, ("vocab", "embed"), std)

    @gathered
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return look_up(self.weight.get_value(), tokens)


def look_up(weight: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a matrix whose rows a tensor axis may cut."""

    def lookup(weight: Array, tokens: Array) -> Array:
        row = tokens - axis_index("vocab") * weight.shape[0]
        here = (row >= 0) & (row < weight.shape[0])
        return axis_sum(jnp.where(here[..., None], weight[jnp.where(here, row, 0)], 0), "vocab")

    return on_shards(lookup, (("vocab", "embed"), ("batch", "length")), RESIDUAL)(weight, tokens)


class Bias(nnx.Module):
    """What a projection adds whose weight is another module's."""

    def __init__(self, size: int, axis: str):
        self.bias = vector(size, axis, "zeros")
