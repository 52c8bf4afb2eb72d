"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), equal to torch.optim.AdamW. Elementwise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.training.optimizers.rule import Slots


@dataclass(frozen=True)
class AdamW:
    beta1: float
    beta2: float
    eps: float

    def init(self, shape: tuple[int, ...], declaration: Any) -> Slots:
        del declaration
        return {"mu": jnp.zeros(shape, jnp.float32), "nu": jnp.zeros(shape, jnp.float32)}

    def shared(self, count: Array) -> tuple[Array, Array]:
        """Corrections of the two moments' bias to 0."""
        return 1 - self.beta1 ** count.astype(jnp.float32), 1 - self.beta2 ** count.astype(jnp.float32)

    def direction(
        self, gradient: Array, slots: Mapping[str, Array], param: Array, declaration: Any, shared: Any
    ) -> tuple[Array, Slots]:
        del param, declaration
        correct1, correct2 = shared
        mu = self.beta1 * slots["mu"] + (1 - self.beta1) * gradient
        nu = self.beta2 * slots["nu"] + (1 - self.beta2) * jnp.square(gradient)
        return mu / correct1 / (jnp.sqrt(nu / correct2) + self.eps), {"mu": mu, "nu": nu}
