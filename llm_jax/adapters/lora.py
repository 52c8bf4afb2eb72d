"""LoRA's modules: a model's own, each with a low-rank update beside its weight.

Hu et al. 2021 (arXiv:2106.09685), eq. 3: `h = W x + s B A x`. Ours are rows times matrices: `a` is their A transposed,
[inputs, rank], and `b` their B transposed, [rank, outputs]; with experts in front where the weight has them, and layers
where it is stacked. The scale s is one per column of `a`: layers of smaller rank have zeros at their end, and adapters
lie side by side.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llm_jax import kernels
from llm_jax.models.experts import ExpertLinear, IntoExperts, OutOfExperts
from llm_jax.models.layers import Embedding, Linear, look_up
from llm_jax.models.noise import Dropout
from llm_jax.models.parameter import LAYERS, Declaration, Init, parameter
from llm_jax.models.remat import PROJECTION
from llm_jax.models.router import Router
from llm_jax.models.weights import gathered


class LowRank(nnx.Module):
    """The update of one weight. All values are bound by `Adapters.expand`; none is initialised here.

    With DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5) also `magnitude`: each output's weights have its length.
    """

    def __init__(self, of: nnx.Variable, rank: int, *, dora: bool = False, dropout: float = 0.0):
        declared: Declaration = of.get_metadata("decl")
        *lead, inputs, outputs = of.get_value().shape
        *axes, input_axis, output_axis = declared.axes
        layers = [(size, axis) for size, axis in zip(lead, axes) if axis == LAYERS]

        def matrix(*sides: tuple[int, str]) -> nnx.Param:
            n = len(lead)
            form = Declaration((*axes, *(a for _, a in sides)), ((n,), (n + 1,)), True, Init("zeros"))
            return parameter((*lead, *(size for size, _ in sides)), form)

        def vector(*sides: tuple[int, str], per_row: bool) -> nnx.Param:
            form = Declaration((*(a for _, a in layers), *(a for _, a in sides)), None, False, Init("zeros"),
                               per_row=per_row)  # fmt: skip
            return parameter((*(size for size, _ in layers), *(size for size, _ in sides)), form)

        self.a = matrix((inputs, input_axis), (rank, "rank"))
        self.b = matrix((rank, "rank"), (outputs, output_axis))
        # In float32 whatever the compute dtype: a scale of 16 / 6 is none of bfloat16's numbers.
        self.scale = vector((rank, "rank_scales"), per_row=True)
        self.keys = vector((0, "rank"), (2, "rank"), per_row=True) if dropout else None
        self.magnitude = vector((outputs, output_axis), per_row=False) if dora else None
        self.rate = dropout

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """What is added to the weight's product."""
        return kernels.matmul(self.scaled(x), self.b.get_value())

    def scaled(self, x: Float[Array, "B T I"]) -> Float[Array, "B T R"]:
        """The part before `b`."""
        return (kernels.matmul(x, self.a.get_value()) * self.scale.get_value()).astype(x.dtype)

    def dropped(self, x: Float[Array, "B T I"]) -> Float[Array, "B T I"]:
        """`x` with a part dropped where the rows' keys were bound, as training does; else `x` itself."""
        if self.keys is None or self.keys.get_value().shape[0] == 0:
            return x
        return Dropout(jax.random.wrap_key_data(self.keys.get_value()), self.rate)(x, 0)

    def update(self) -> Float[Array, "... I O"]:
        """What is added to the weight where the two are one matrix. Not where each row has its own scale."""
        return jnp.matmul(
            self.a.get_value() * self.scale.get_value(), self.b.get_value(), precision=jax.lax.Precision.HIGHEST
        )

    def factor(self, weight: Float[Array, "I O"]) -> Float[Array, " O"] | None:
        """float32: DoRA's magnitude over the length of `weight + update`, a constant to the gradient (section 4.3).
        1 in layers of a stack that have no adapter; None without DoRA."""
        if self.magnitude is None:
            return None
        whole = weight.astype(jnp.float32) + self.update().astype(jnp.float32)
        length = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(whole), axis=0)))
        here = jnp.any(self.scale.get_value() != 0)
        return jnp.where(here, self.magnitude.get_value().astype(jnp.float32) / length, 1.0)


class LoraLinear(Linear):
    """A projection with an update."""

    def __init__(self, base: Linear, rank: int, **options: Any):
        self.weight, self.bias = base.weight, base.bias
        self.lora = LowRank(base.weight, rank, **options)

    @gathered
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight = self.weight.get_value()
        y = checkpoint_name(kernels.matmul(x, weight), PROJECTION)
        inner, factor = self.lora.dropped(x), self.lora.factor(weight)
        update = self.lora(inner)
        if factor is None:
            y = y + update
        elif inner is x:
            y = (factor * (y + update)).astype(x.dtype)
        else:
            # PEFT's reading: what the factor changes of the product is a part of the update, and has its dropout.
            y = y + ((factor - 1) * kernels.matmul(inner, weight) + factor * update).astype(x.dtype)
        return y if self.bias is None else y + self.bias.get_value()

    def factors(self, x: Float[Array, "B T I"]) -> tuple[Float[Array, "B T E"], Float[Array, "E O"]]:
        """The rank is as many more inputs: the update needs no matrix of the weight's size."""
        inner, weight = self.lora.scaled(self.lora.dropped(x)), self.weight.get_value()
        stacked = jnp.concatenate([weight, self.lora.b.get_value()])
        factor = self.lora.factor(weight)
        if factor is not None:
            stacked = (stacked * factor).astype(weight.dtype)
        return jnp.concatenate([x, inner], axis=-1), stacked

    def whole(self) -> Float[Array, "I O"]:
        weight = self.weight.get_value()
        whole, factor = weight + self.lora.update().astype(weight.dtype), self.lora.factor(weight)
        return whole if factor is None else (whole * factor).astype(weight.dtype)


class LoraEmbedding(Embedding):
    """Token vectors with an update. A head that is tied to them keeps to the weight alone, as in PEFT."""

    def __init__(self, base: Embedding, rank: int, **options: Any):
        self.weight = base.weight
        self.lora = LowRank(base.weight, rank, **options)

    @gathered
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        weight, scale = self.weight.get_value(), self.lora.scale.get_value()
        rows = look_up(weight, tokens)
        inner = (look_up(self.lora.a.get_value(), tokens) * scale).astype(rows.dtype)
        rows, factor = rows + kernels.matmul(inner, self.lora.b.get_value()), self.lora.factor(weight)
        return rows if factor is None else (rows * factor).astype(rows.dtype)


class _LoraExperts(ExpertLinear):
    """Experts with an update each; not for rows of several adapters, since rows here are sorted by expert."""

    def __init__(self, base: ExpertLinear, rank: int):
        self.weight, self.bias = base.weight, base.bias
        self.lora = LowRank(base.weight, rank)

    def operands(self, axes: tuple[str, str, str]) -> tuple[Any, Any]:
        experts, inputs, outputs = axes
        a, b, scale = self.lora.a.get_value(), self.lora.b.get_value(), self.lora.scale.get_value()
        scaled = (a * scale).astype(a.dtype)
        return (self.weight.get_value(), scaled, b), (axes, (experts, inputs, None), (experts, None, outputs))

    @staticmethod
    def times(rows: Float[Array, "M I"], operands: Any, sizes: Int[Array, " E"]) -> Float[Array, "M O"]:
        weight, a, b = operands
        inner = kernels.grouped_matmul(rows, a, sizes)
        return kernels.grouped_matmul(rows, weight, sizes) + kernels.grouped_matmul(inner, b, sizes)


class LoraIntoExperts(_LoraExperts, IntoExperts):
    """From tokens."""


class LoraOutOfExperts(_LoraExperts, OutOfExperts):
    """To tokens."""


class LoraRouter(Router):
    """A router with an update, of the matrix that gives its logits."""

    def __init__(self, base: Router, rank: int):
        vars(self).update(vars(base))
        self.lora = LowRank(base.weight, rank)

    def whole(self) -> Float[Array, "D E"]:
        return self.weight.get_value() + self.lora.update()


def adapted(module: Any, rank: int, **options: Any) -> Any:
    """The module with an update of `rank` beside its weight. `options`: `dora` and `dropout` of dense ones."""
    kinds = {
        Linear: LoraLinear,
        Embedding: LoraEmbedding,
        IntoExperts: LoraIntoExperts,
        OutOfExperts: LoraOutOfExperts,
        Router: LoraRouter,
    }
    return kinds[type(module)](module, rank, **options)
