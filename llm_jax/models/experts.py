"""Mixture of experts: tokens sorted by expert, products group by group, results added up again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llm_jax import kernels
from llm_jax.models.config import ModelConfig
from llm_jax.models.feed_forward import ACTIVATIONS, FeedForward, residual_std, swiglu
from llm_jax.models.layers import Linear
from llm_jax.models.parameter import Declaration, Init, parameter
from llm_jax.models.remat import PROJECTION
from llm_jax.models.router import CHOSEN, Router, Routes
from llm_jax.models.weights import gathered, in_compute
from llm_jax.sharding import axis_index, axis_sum, on_shards

ROWS, INNER, SIZES = ("batch", None), ("batch", "mlp"), ("batch", None)


class Dispatch(NamedTuple):
    """How the assignments of tokens to experts are sorted into rows. Each data shard sorts its own tokens."""

    order: Int[Array, " M"]
    """Row -> assignment (token * k + choice)."""
    places: Int[Array, "N k"]
    """Assignment -> row."""
    sizes: Int[Array, "shards E"]
    """Rows of each expert. Rows behind the last expert's belong to assignments that go nowhere."""


DISPATCH = (("batch",), ROWS, SIZES)


def dispatch(experts: Int[Array, "B T k"], num: int) -> Dispatch:
    """Stable: an expert's rows are in the order of tokens."""

    def sort(experts: Array) -> tuple[Array, Array, Array]:
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        places = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=order.dtype), unique_indices=True)
        sizes = jnp.sum(flat[:, None] == jnp.arange(num), 0, dtype=jnp.int32)
        return order, places.reshape(-1, experts.shape[2]), sizes[None]

    return Dispatch(*on_shards(sort, (CHOSEN,), DISPATCH)(experts))


@jax.custom_vjp
def _spread(x: Float[Array, "N D"], order: Int[Array, " M"], places: Int[Array, "N k"]) -> Float[Array, "M D"]:
    """Row m is the token of assignment `order[m]`. Transposed it is `_collect`: both read, neither scatters."""
    return x.at[order // places.shape[1]].get(mode="promise_in_bounds")


@jax.custom_vjp
def _collect(rows: Float[Array, "M D"], order: Int[Array, " M"], places: Int[Array, "N k"]) -> Float[Array, "N D"]:
    """Each token gets the sum of its rows, in float32 within."""
    parts = rows.at[places].get(mode="promise_in_bounds", unique_indices=True)
    return parts.sum(1, dtype=jnp.float32).astype(rows.dtype)


_spread.defvjp(
    lambda x, order, places: (_spread(x, order, places), (order, places)),
    lambda saved, g: (_collect(g, *saved), None, None),
)
_collect.defvjp(
    lambda rows, order, places: (_collect(rows, order, places), (order, places)),
    lambda saved, g: (_spread(g, *saved), None, None),
)


class ExpertLinear(nnx.Module):
    """`rows @ weight[e] + bias[e]` with the weights of each row's expert, stacked `[E, inputs, outputs]`."""

    def __init__(self, experts: int, inputs: int, outputs: int, axes: tuple[str, str], *, bias: bool, std: float):
        declared = Declaration(("experts", *axes), ((1,), (2,)), True, Init("normal", std))
        self.weight = parameter((experts, inputs, outputs), declared)
        of_bias = Declaration(("experts", axes[1]), None, False, Init("zeros"))
        self.bias = parameter((experts, outputs), of_bias) if bias else None

    def operands(self, axes: tuple[str, str, str]) -> tuple[Any, Any]:
        """What `times` takes besides rows, and its axes where those of the weight are `axes`."""
        return self.weight.get_value(), axes

    @staticmethod
    def times(rows: Float[Array, "M I"], operands: Any, sizes: Int[Array, " E"]) -> Float[Array, "M O"]:
        """The product, on one shard."""
        return kernels.grouped_matmul(rows, operands, sizes)


class IntoExperts(ExpertLinear):
    """From whole rows to rows that the tensor axis cuts."""

    @gathered
    def __call__(self, rows: Float[Array, "M D"], sizes: Int[Array, "shards E"]) -> Float[Array, "M F"]:
        def product(rows: Array, sizes: Array, operands: Any, bias: Array | None) -> Array:
            out = self.times(rows, operands, sizes[0])
            return out if bias is None else out + _per_row(bias, sizes[0], rows.shape[0]).astype(out.dtype)

        bias = None if self.bias is None else self.bias.get_value()
        operands, axes = self.operands(("experts", "embed", "mlp"))
        in_axes = (ROWS, SIZES, axes, None if bias is None else ("experts", "mlp"))
        out = on_shards(product, in_axes, INNER)(rows, sizes, operands, bias)
        return checkpoint_name(out, PROJECTION)

    @property
    def plain(self) -> bool:
        """Whether there is nothing to it but the product."""
        return type(self) is IntoExperts and self.bias is None

    @gathered
    def swiglu(
        self, gate: IntoExperts, rows: Float[Array, "M D"], sizes: Int[Array, "shards E"]
    ) -> Float[Array, "M F"]:
        """`silu(gate(rows)) * self(rows)`, of two that are `plain`."""

        def product(rows: Array, sizes: Array, gate: Array, up: Array) -> Array:
            return kernels.grouped_swiglu(rows, gate, up, sizes[0])

        axes = "experts", "embed", "mlp"
        weights = (side.weight.get_value() for side in (in_compute(gate), self))
        return on_shards(product, (ROWS, SIZES, axes, axes), INNER)(rows, sizes, *weights)


class OutOfExperts(ExpertLinear):
    """From rows that the tensor axis cuts to tokens, each the sum of what its experts give."""

    @gathered
    def __call__(
        self, rows: Float[Array, "M F"], weights: Float[Array, "M 1"], routed: Dispatch
    ) -> Float[Array, "N D"]:
        """`rows` are weighted already; `weights` are for the bias."""

        def product(rows: Array, weights: Array, routed: tuple, operands: Any, bias: Array | None) -> Array:
            order, places, sizes = routed
            out = self.times(rows, operands, sizes[0])
            if bias is not None:
                once = axis_index("mlp") == 0
                out = out + jnp.where(once, weights * _per_row(bias, sizes[0], rows.shape[0]), 0.0).astype(out.dtype)
            return axis_sum(_collect(out, order, places), "mlp")

        bias = None if self.bias is None else self.bias.get_value()
        operands, axes = self.operands(("experts", "mlp", "embed"))
        in_axes = (INNER, ROWS, DISPATCH, axes, None if bias is None else ("experts", "embed"))
        return on_shards(product, in_axes, ROWS)(rows, weights, tuple(routed), operands, bias)


def _per_row(bias: Float[Array, "E F"], sizes: Int[Array, " E"], rows: int) -> Float[Array, "M F"]:
    """float32: the bias of each row's expert, 0 behind the last. As a product, whose gradient is no scatter."""
    ends = jnp.cumsum(sizes)
    at = jnp.arange(rows)[:, None]
    own = (at < ends) & (at >= ends - sizes)
    return jnp.dot(own.astype(jnp.float32), bias.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


class Experts(nnx.Module):
    """A mixture of experts in place of a dense feed-forward layer (see `Router` for how tokens choose).

    Dropless: whatever the load, every expert gets all tokens that chose it. With `capacity_factor` some are dropped,
    and counted. Experts are as the dense layer would be (`activation`, `gated`), or as those of gpt-oss (`limit`).
    """

    def __init__(self, config: ModelConfig):
        experts, D = config.experts, config.hidden_size
        F = experts.intermediate_size or config.intermediate_size
        width, out_std = experts.latent_size or D, residual_std(config)
        options = {"bias": experts.bias, "std": config.init_std}
        self.config, self.activation, self.gated = experts, config.activation, config.gated
        self.router = Router(config)
        if experts.latent_size:
            self.latent_in = Linear(D, width, ("embed", "norm"), bias=config.mlp_bias, std=config.init_std)
            self.latent_out = Linear(width, D, ("norm", "embed"), bias=config.mlp_bias, std=out_std)
        if config.gated:
            self.gate = IntoExperts(experts.num, width, F, ("embed", "mlp"), **options)
        self.up = IntoExperts(experts.num, width, F, ("embed", "mlp"), **options)
        self.down = OutOfExperts(experts.num, F, width, ("mlp", "embed"), bias=experts.bias, std=out_std)
        if experts.shared_size:
            self.shared = FeedForward(replace(config, intermediate_size=experts.shared_size))
        if experts.shared_gate:
            self.shared_gate = Linear(D, 1, ("embed", "norm"), bias=False, std=config.init_std)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        noise: Float[Array, "B T E"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """What the experts give, in x's dtype, and the router's statistics (see `Router`, also for `noise`).

        Padding (segment 0) is sent to no expert: it gets 0 from them.
        """
        routes, statistics = self.router(x, segment_ids, noise)
        out = self._routed(x, routes)
        if self.config.shared_size:
            shared = self.shared(x)
            if self.config.shared_gate:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x))
            out = out + shared
        return out, statistics

    def _routed(self, x: Float[Array, "B T D"], routes: Routes) -> Float[Array, "B T D"]:
        tokens = self.latent_in(x) if self.config.latent_size else x
        routed = dispatch(routes.experts, self.config.num)
        spread = on_shards(_spread, (ROWS, ("batch",), ROWS), ROWS)
        rows = spread(tokens.reshape(-1, tokens.shape[-1]), routed.order, routed.places)
        weights = spread(routes.weights.reshape(-1, 1), routed.order, routed.places.reshape(-1, 1))
        if self.config.weigh == "input":
            rows = (rows * weights).astype(rows.dtype)
        inner = self._activated(rows, routed.sizes)
        if self.config.weigh == "output":
            # Before the last projection, which is linear: its product then is not needed for the weights' gradient.
            inner = (inner * weights).astype(inner.dtype)
        out = self.down(inner, weights, routed).reshape(*x.shape[:2], -1)
        return self.latent_out(out) if self.config.latent_size else out

    def _activated(self, rows: Float[Array, "M D"], sizes: Int[Array, "shards E"]) -> Float[Array, "M F"]:
        act, limit = ACTIVATIONS[self.activation], self.config.limit
        if not self.gated:
            return act(self.up(rows, sizes))
        if self.activation == "silu" and limit is None and self.gate.plain and self.up.plain:
            return self.up.swiglu(self.gate, rows, sizes)
        gate, up = self.gate(rows, sizes), self.up(rows, sizes)
        if limit is not None:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            return (up + 1) * gate * jax.nn.sigmoid(self.config.alpha * gate)
        return swiglu(gate, up) if self.activation == "silu" else act(gate) * up
