"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2). Elementwise, so optax's is right for stacked layers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from llm_jax.training.config import LionConfig
from llm_jax.training.optimizers.rule import Slots


class Lion:
    """The sign of `beta1 m + (1 - beta1) g`, with `m` decaying by `beta2`."""

    def __init__(self, config: LionConfig):
        self._transform = optax.scale_by_lion(config.beta1, config.beta2)

    def init(self, shape: tuple[int, ...], declaration: Any) -> Slots:
        del declaration
        return {"momentum": jnp.zeros(shape, jnp.float32)}

    def shared(self, count: Array) -> Array:
        return count

    def direction(
        self, gradient: Array, slots: Mapping[str, Array], param: Array, declaration: Any, shared: Any
    ) -> tuple[Array, Slots]:
        del param, declaration
        state = optax.ScaleByLionState(count=shared, mu=slots["momentum"])
        sign, state = self._transform.update(gradient, state)
        return sign, {"momentum": state.mu}  # type: ignore[union-attr]
