"""What a state-space layer keeps of the past: a few inputs of its convolution and its state, whatever the length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.models.mamba_config import MambaConfig


@partial(jax.tree_util.register_dataclass, data_fields=["conv", "state"], meta_fields=[])
@dataclass(frozen=True)
class StateCache:
    """A row's tokens may be ragged: padding (segment id 0) leaves no trace, before or after the others."""

    conv: tuple[Float[Array, "B K-1 C"], ...]
    """The last inputs of each convolution, oldest first."""
    state: Float[Array, "B ..."]
    """float32: [B, I, N] of Mamba, [B, H, P, N] of Mamba-2."""


def init_state(config: MambaConfig, batch: int, dtype: str = "float32") -> StateCache:
    """The state before any token: zeros. `dtype` is that of the convolution's inputs."""

    def inputs(channels: int) -> Array:
        return jnp.zeros((batch, config.conv_width - 1, channels), dtype)

    if config.num_heads:
        shape = (batch, config.num_heads, config.head_dim, config.state_size)
        conv = inputs(config.inner_size), inputs(2 * config.num_groups * config.state_size)
    else:
        shape, conv = (batch, config.inner_size, config.state_size), (inputs(config.inner_size),)
    return StateCache(conv, jnp.zeros(shape, jnp.float32))
