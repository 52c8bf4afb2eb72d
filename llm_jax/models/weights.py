"""Weights at the moment of their use: gathered and cast, one small module at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from llm_jax.kernels.grouped_swiglu import SAVED
from llm_jax.models.parameter import LAYERS, map_values
from llm_jax.sharding import compute_weights, current_plan


def in_compute[M: nnx.Module](module: M) -> M:
    """The module with its weights gathered and cast for use."""

    def gather(values: dict[str, Any], declared: dict[str, Any]) -> dict[str, Any]:
        axes = jax.tree.map(lambda d: d.axes[1:] if d.axes[0] == LAYERS else d.axes, declared)
        return compute_weights(values, axes)

    return map_values(module, gather)


def gathered[**P, T](call: Callable[P, T]) -> Callable[P, T]:
    """For a method of a module that reads its weights: runs it `in_compute`.

    The backward pass casts and gathers again. Were the results saved for it, a scan over layers would stack them: all
    the weights once more, and in ZeRO 3 all of them gathered. Saved are the method's inputs; of what is recomputed,
    the product of a projection is not needed and dropped. Where products are needed, they are saved, by their name.
    """
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)

    @functools.wraps(call)
    def run(module, *args):
        if current_plan() is None:
            return call(module, *args)  # type: ignore[call-arg]
        in_use = jax.checkpoint(lambda module, *args: call(in_compute(module), *args), policy=policy)  # type: ignore[call-arg]
        return in_use(module, *args)

    return run  # type: ignore[return-value]
