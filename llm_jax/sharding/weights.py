"""From float32 masters as stored to weights as used, and back for their gradients."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.sharding.axes import FLOAT32_AXES
from llm_jax.sharding.context import constrain_spec, current_plan
from llm_jax.sharding.plan import Plan

Axes = tuple[str | None, ...]


@partial(jax.tree_util.register_dataclass, data_fields=("value", "slot"), meta_fields=())
@dataclass(frozen=True)
class Gathered:
    """A weight gathered for the whole step, and the float32 slot that its gradient goes to.

    `value` is in compute dtype and takes no gradient; differentiate with respect to `slot` (its values are never
    read): what arrives there has not been rounded to the compute dtype. `compute_weights` takes it like an array.
    """

    value: Array
    slot: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype


def _cast_and_gather(weight: Array, dtype: Any, axes: Axes, plan: Plan | None) -> Array:
    # Cast before gathering: half the bytes on the wire.
    weight = weight.astype(dtype)
    return weight if plan is None else constrain_spec(weight, plan.compute_spec(axes))


def dtype_in_use(axes: Axes, dtype: Any) -> Any:
    """What a parameter is computed with where others are `dtype`: see `FLOAT32_AXES`."""
    return jnp.dtype(jnp.float32) if set(FLOAT32_AXES) & set(axes) else jnp.dtype(dtype)


def _pin_cast(weight: Array, dtype: Any) -> Array:
    """Keeps XLA from moving the cast to bfloat16 out of the layer loop, where a second copy of all weights results.

    Rounding first changes no bit and gives the float32 slice a use of its own; the TPU compiler's bf16_propagation
    would otherwise make the loop carry bfloat16, and optimization_barrier does not stop it.
    """
    if dtype != jnp.bfloat16 or weight.dtype != jnp.float32:
        return weight
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(weight, info.nexp, info.nmant)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _use(value: Array, slot: Array | None, dtype: Any, axes: Axes) -> Array:
    return _cast_and_gather(_pin_cast(value, dtype), dtype, axes, current_plan())


def _use_forward(value: Array, slot: Array | None, dtype: Any, axes: Axes) -> tuple[Array, Any]:
    likes = jnp.zeros((), value.dtype), None if slot is None else jnp.zeros((), slot.dtype)
    return _use(value, slot, dtype, axes), likes


def _use_backward(dtype: Any, axes: Axes, likes: Any, gradient: Array) -> tuple[Any, Any]:
    plan = current_plan()
    value_like, slot_like = likes
    if plan is not None:
        # Before the cast, so that reducing and cutting are neighbours and become one reduce-scatter.
        gradient = constrain_spec(gradient, plan.gradient_spec(axes, gradient.shape))
    gradient = gradient.astype(jnp.float32)
    if plan is not None and plan.mesh.size > 1:
        # Without a barrier XLA moves the reduction over `data` out of the loops over layers and microbatches, which
        # takes twice the memory of the gradients and, in bfloat16, rounds their float32 sum.
        gradient = jax.lax.optimization_barrier(gradient)
    if slot_like is None:
        return gradient.astype(value_like.dtype), None
    return jnp.zeros(gradient.shape, value_like.dtype), gradient.astype(slot_like.dtype)


_use.defvjp(_use_forward, _use_backward)


def compute_weights(tree: Any, axes_tree: Any, dtype: Any = None) -> Any:
    """Weights ready for use: cast to the plan's compute dtype, then gathered to their compute spec.

    Their gradients are float32 (where the weights given are, or are `Gathered`) and constrained to the gradient spec:
    in ZeRO 2 and 3 cut over `data` as they leave the block, so that they are reduced and scattered block by block.

    `tree` is a pytree of arrays or `Gathered`; `axes_tree` has its structure with a tuple of logical weight axes for
    each of them. Call it where the weights are used, inside the scanned block: what ZeRO 3 gathers then lives for one
    block. `dtype` replaces the plan's compute dtype. Arrays that are not floating pass untouched; without a plan and a
    dtype everything does.
    """
    plan = current_plan()
    if plan is None and dtype is None:
        return tree

    def one(weight: Any, axes: Any) -> Any:
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            return weight
        to = dtype_in_use(axes, plan.compute_dtype if dtype is None else dtype)  # type: ignore[union-attr]
        value, slot = (weight.value, weight.slot) if isinstance(weight, Gathered) else (weight, None)
        return _use(value, slot, to, tuple(axes))

    return jax.tree.map(one, tree, axes_tree, is_leaf=lambda node: isinstance(node, Gathered))


def gather_all(tree: Any, axes_tree: Any) -> Any:
    """One copy of all weights in compute dtype and compute spec, without gradient: ZeRO 0-2 make it once a step."""
    plan = current_plan()
    assert plan is not None, "gather_all needs a plan in force"

    def one(weight: Array, axes: Axes) -> Array:
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            return weight
        return _cast_and_gather(weight, dtype_in_use(axes, plan.compute_dtype), tuple(axes), plan)

    return jax.tree.map(one, jax.lax.stop_gradient(tree), axes_tree)
