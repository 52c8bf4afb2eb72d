"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5), without a first moment.

optax's own takes the two longest axes of a stacked `[L, D, F]` for the matrix (L among them where layers are many), and
clips and scales by the root mean square over all layers. Here each layer is a matrix of its own.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.training.config import AdafactorConfig
from llm_jax.training.optimizers.rule import COLUMNS, ROWS, Slots, kept_axes, own_axes


class Adafactor:
    """Equal to transformers.Adafactor(relative_step=False) without decay: learning_rate is the paper's rho_t.

    Every declared matrix is factored, however small. Decay is not multiplied by the parameter's scale.
    """

    def __init__(self, config: AdafactorConfig):
        self._config = config

    def init(self, shape: tuple[int, ...], declaration: Any) -> Slots:
        names = ("nu",) if declaration.matrix is None else (ROWS, COLUMNS)
        shapes = {name: tuple(shape[i] for i in kept_axes(name, declaration)) for name in names}
        return {name: jnp.zeros(size, jnp.float32) for name, size in shapes.items()}

    def shared(self, count: Array) -> Array:
        """Decay of the second moment; 0 at the first step."""
        return 1 - count.astype(jnp.float32) ** -self._config.decay_rate

    def direction(
        self, gradient: Array, slots: Mapping[str, Array], param: Array, declaration: Any, shared: Any
    ) -> tuple[Array, Slots]:
        config, own, decay = self._config, own_axes(declaration), shared
        squares = jnp.square(gradient) + config.eps
        if declaration.matrix is None:
            new = {"nu": decay * slots["nu"] + (1 - decay) * squares}
            update = gradient / jnp.sqrt(new["nu"])
        else:
            rows, columns = declaration.matrix
            means = {ROWS: jnp.mean(squares, columns, keepdims=True), COLUMNS: jnp.mean(squares, rows, keepdims=True)}
            full = {name: decay * slots[name].reshape(mean.shape) + (1 - decay) * mean for name, mean in means.items()}
            of_row = full[ROWS] / jnp.mean(full[ROWS], rows, keepdims=True)
            update = gradient / (jnp.sqrt(of_row) * jnp.sqrt(full[COLUMNS]))
            new = {name: full[name].reshape(slots[name].shape) for name in full}
        update = update / jnp.maximum(1.0, _rms(update, own) / config.clip_threshold)
        if config.scale_parameter:
            update = update * jnp.maximum(config.min_scale, _rms(param, own))
        return update, new


def _rms(x: Array, axes: tuple[int, ...]) -> Array:
    """Root mean square of each layer, keeping dimensions."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True))
