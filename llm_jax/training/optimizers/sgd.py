"""SGD with momentum (Sutskever et al. 2013) and decoupled decay (arXiv:1711.05101, algorithm 1).

Without decay equal to torch.optim.SGD, whose decay is not decoupled: it goes through the momentum. Elementwise, so
optax's trace is right for stacked layers.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from llm_jax.training.config import SGDConfig
from llm_jax.training.optimizers.rule import Slots


class SGD:
    """`m = momentum m + g`; steps along m, with `nesterov` along g + momentum m, without momentum along g."""

    def __init__(self, config: SGDConfig):
        self._trace = optax.trace(config.momentum, config.nesterov) if config.momentum else None

    def init(self, shape: tuple[int, ...], declaration: Any) -> Slots:
        del declaration
        return {} if self._trace is None else {"momentum": jnp.zeros(shape, jnp.float32)}

    def shared(self, count: Array) -> Array:
        return count

    def direction(
        self, gradient: Array, slots: Mapping[str, Array], param: Array, declaration: Any, shared: Any
    ) -> tuple[Array, Slots]:
        del param, declaration, shared
        if self._trace is None:
            return gradient, {}
        step, state = self._trace.update(gradient, optax.TraceState(slots["momentum"]))
        return step, {"momentum": state.trace}  # type: ignore[union-attr]
