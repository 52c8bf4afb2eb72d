"""A layer of experts, small enough for tests, on rows with several documents and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llm_jax.models.config import ModelConfig
from llm_jax.models.experts import Experts
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.parameter import bind
from llm_jax.objectives import experts as losses

D, F, E, B, T = 16, 24, 6, 8, 12
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 4 + [3] + [0] * 2, [1] * 12, [0] * 12, [1] * 3 + [0] * 9] * 2)


def config(model=(), **fields) -> ModelConfig:
    experts = ExpertsConfig(**{"num": E, "top_k": 2, **fields})
    return ModelConfig(
        vocab_size=16, hidden_size=D, intermediate_size=F, num_heads=4, experts=experts, **dict(model)
    ).resolved()


@functools.cache
def compiled(config: ModelConfig):
    return jax.jit(lambda params, *inputs: bind(Experts(config), params)(*inputs))


def run(config: ModelConfig, params, x: Array = X, segment_ids: Array | None = SEGMENTS, noise: Array | None = None):
    return compiled(config)(params, x, segment_ids, noise)


def all_losses(s, fixed=None):
    """Every loss of a layer's statistics; `fixed`: what the whole batch says, where `s` is a part of it."""
    of = s if fixed is None else {**s, **{name: fixed[name] for name in ("assigned", "tokens", "sequences")}}
    return (
        losses.load_balance(of["assigned"], of["probability"], of["tokens"])
        + losses.sequence_balance(of["sequence_product"], of["sequences"], E, 2)
        + 0.1 * losses.router_z(of["z"], of["tokens"])
    )
