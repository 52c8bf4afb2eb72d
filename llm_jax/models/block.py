"""A layer of the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from llm_jax.models.attention import Attention
from llm_jax.models.cache import Cache, with_dropout
from llm_jax.models.config import ModelConfig
from llm_jax.models.experts import Experts
from llm_jax.models.feed_forward import FeedForward
from llm_jax.models.latent import LatentAttention
from llm_jax.models.layers import RESIDUAL
from llm_jax.models.mamba import Mamba
from llm_jax.models.mamba2 import Mamba2
from llm_jax.models.noise import router_noise
from llm_jax.models.norms import Norm, make_norm
from llm_jax.models.segments import LayerSpec
from llm_jax.models.shared import Shared
from llm_jax.sharding import constrain


class Block(nnx.Module):
    """A layer: a mixer (attention, latent attention, a state space) and a feed-forward, or one of them alone.

    Each is added to the residual stream, with norms where the model has them.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec):
        def norm(wanted: bool) -> Norm | None:
            return make_norm(config) if wanted else None

        pre, out = config.norm_at in ("pre", "sandwich"), config.norm_at in ("output", "sandwich")
        post = config.norm_at == "post"
        self.mixer, self.feed_forward = spec.mixer, spec.feed_forward
        mixes, feeds = spec.mixer != "none", spec.feed_forward != "none"
        self.attention_norm = norm((pre or post) and mixes and spec.normed)
        if spec.mixer == "attention":
            self.attention = Attention(config, spec)
        elif spec.mixer == "latent":
            self.latent = LatentAttention(config)
        elif spec.mixer == "mamba":
            self.mamba = Mamba(config)
        elif spec.mixer == "mamba2":
            self.mamba2 = Mamba2(config)
        self.attention_out_norm = norm(out and mixes)
        self.mlp_norm = norm((pre or post) and feeds and config.parallel != "one_norm")
        made = {"dense": FeedForward, "experts": Experts}
        self.mlp: FeedForward | Experts | None = made[spec.feed_forward](config) if feeds else None
        self.mlp_out_norm = norm(out and feeds)
        self.pre, self.post, self.parallel, self.scale = pre, post, config.parallel, config.residual_scale
        self.residual_normed = config.residual_normed

    def __call__(
        self, hidden: Array, shared: Shared, layer_inputs: Mapping[str, Any] | None, cache: Cache, taps: Sequence[str]
    ) -> tuple[Array, Cache, dict[str, Any]]:
        """`(params = self, hidden [B,T,D], shared, layer inputs, cache) -> (hidden, cache, the taps asked for)`.

        Beside the taps, under `experts`, the router's statistics where the layer has one.
        """
        inputs = layer_inputs or {}
        if "attention_dropout" in inputs and self.mixer in ("attention", "latent"):
            cache = with_dropout(cache, inputs["attention_dropout"])

        def added(out: Array, norm: Norm | None, site: int) -> Array:
            """What a sublayer adds to the residual stream."""
            out = out if norm is None else norm(out)
            if "residual_dropout" in inputs:
                out = inputs["residual_dropout"](out, site)
            return out if self.scale == 1.0 else out * self.scale

        def after(hidden: Array, norm: Norm | None) -> Array:
            hidden = constrain(hidden, RESIDUAL)
            return norm(hidden) if self.post and norm is not None else hidden

        def before(hidden: Array, norm: Norm | None) -> Array:
            return norm(hidden) if self.pre and norm is not None else hidden

        hidden = constrain(hidden, RESIDUAL)
        normed = before(hidden, self.attention_norm)
        attention_out = mlp_out = jnp.zeros_like(hidden)
        statistics: dict[str, Any] = {}
        if self.mixer != "none":
            attention_out, cache = getattr(self, self.mixer)(normed, shared, cache)
            attention_out = added(attention_out, self.attention_out_norm, 0)
            if self.residual_normed:
                hidden = normed
            if self.parallel == "no":
                hidden = after(hidden + attention_out, self.attention_norm)
        if self.mlp is not None:
            normed = normed if self.parallel == "one_norm" else before(hidden, self.mlp_norm)
            mlp_out, statistics = self._feed_forward(normed, shared, inputs)
            if self.residual_normed:
                hidden = normed
            mlp_out = added(mlp_out, self.mlp_out_norm, 1)
            if self.parallel != "no":
                hidden = hidden + attention_out
            hidden = after(hidden + mlp_out, self.mlp_norm)
        if "residual" in inputs:
            hidden = hidden + inputs["residual"].astype(hidden.dtype)
        seen = {"hidden": hidden, "attention_out": attention_out, "mlp_out": mlp_out}
        return hidden, cache, {name: seen[name] for name in taps} | statistics

    def _feed_forward(self, x: Array, shared: Shared, inputs: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        if not isinstance(self.mlp, Experts):
            assert self.mlp is not None
            return self.mlp(x), {}
        noise = None
        if "router_noise" in inputs:
            noise = router_noise(inputs["router_noise"], x.shape[1], self.mlp.config.num)
        out, statistics = self.mlp(x, shared.meta.segment_ids, noise)
        return out, {"experts": statistics}
