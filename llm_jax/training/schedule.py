"""Learning rate by step, equal to `transformers.get_scheduler` where it has the shape."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.base.errors import UserError
from llm_jax.training.config import OptimizerConfig

Schedule = Callable[[Array], Array]


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """`step (int32[], from 0) -> learning rate (float32[])` over `steps` optimizer steps.

    Warm-up rises linearly from 0 (step s: s / warmup_steps of the peak), as torch's LambdaLR after s scheduler steps.
    Then, with f = final_fraction and p the share of what is left that has passed: `constant` stays; `cosine`
    f + (1-f)(1 + cos(pi p))/2 (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5); `linear` f + (1-f)(1-p); `wsd`
    stays, then falls linearly over the last decay_steps (Hu et al. 2024, arXiv:2404.06395). Past the end it keeps its
    last value (transformers' cosine rises again there). transformers' wsd warms up from f instead of 0.
    Raises UserError for lengths that do not fit in `steps`.
    """
    warmup = config.warmup_steps
    if not 0 <= warmup <= steps:
        raise UserError(f"optimizer.warmup_steps is {warmup}; it must be between 0 and the {steps} steps of the run")
    if not 0.0 <= config.final_fraction <= 1.0:
        raise UserError(f"optimizer.final_fraction is {config.final_fraction}; it must be between 0 and 1")
    start = warmup
    if config.schedule == "wsd":
        decay = steps // 5 if config.decay_steps is None else config.decay_steps
        if decay < 0 or warmup + decay > steps:
            raise UserError(f"optimizer.decay_steps is {decay}; with {warmup} of warm-up it does not fit {steps} steps")
        start = steps - decay

    def schedule(step: Array) -> Array:
        s = jnp.asarray(step, jnp.float32)
        p = jnp.clip((s - start) / max(1, steps - start), 0.0, 1.0)
        if config.schedule == "constant":
            shape = jnp.ones_like(p)
        elif config.schedule == "cosine":
            shape = 0.5 * (1.0 + jnp.cos(jnp.pi * p))
        else:
            shape = 1.0 - p
        factor = config.final_fraction + (1.0 - config.final_fraction) * shape
        return config.learning_rate * jnp.where(s < warmup, s / max(1, warmup), factor)

    return schedule
