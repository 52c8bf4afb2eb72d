"""Multi-token prediction: a layer for each further token that is predicted at a position (DeepSeek-V3)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import Linear
from llm_jax.models.norms import make_norm


class FurtherToken(nnx.Module):
    """One depth of DeepSeek-V3 (arXiv:2412.19437), section 2.2, eq. 21-23, which shares the model's embedding and head.

    `block` is a layer of the model. What comes in is the state of the depth before, of the model itself after its final
    norm, as the engines that run published weights take it.
    """

    def __init__(self, config: ModelConfig, block: nnx.Module):
        self.hidden_norm, self.embed_norm = make_norm(config), make_norm(config)
        axes = ("embed", "norm")
        self.project = Linear(2 * config.hidden_size, config.hidden_size, axes, bias=False, std=config.init_std)
        self.block, self.norm = block, make_norm(config)

    def combined(self, hidden: Float[Array, "B T D"], embedded: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What goes into the block, from the state at each position and the vector of the token ahead of it."""
        return self.project(jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], axis=-1))


def ahead(x: Int[Array, "... T"], by: int) -> Int[Array, "... T"]:
    """The element `by` places ahead of each; 0 beyond the end."""
    return jnp.concatenate([x[..., by:], jnp.zeros_like(x[..., :by])], axis=-1)


def same_document(segment_ids: Int[Array, "... T"], by: int) -> Bool[Array, "... T"]:
    """Whether the place `by` ahead is of the same document, padding (0) being of none."""
    return (segment_ids != 0) & (ahead(segment_ids, by) == segment_ids)
