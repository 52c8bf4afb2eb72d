"""`on_shards`: kernels on the shards of their arguments, with collectives named by logical axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from llm_jax.sharding.axes import mesh_axis
from llm_jax.sharding.context import current_plan, manual_axes


def _is_axes(node: Any) -> bool:
    """A tuple of logical names, the leaf of an axes pytree. An empty tuple is a scalar's."""
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def on_shards(fn: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any) -> Callable[..., Any]:
    """`fn` run once per shard: a `shard_map` over the whole mesh, written in logical activation axes.

    `in_axes` has an entry per argument, `out_axes` mirrors the result. An entry is a tuple of logical names, as
    `("batch", "length", "heads", None)`; or None: an argument that is replicated or is None itself, a replicated
    result; or a pytree (dict, list, tuple) of these. Inside `fn`, `axis_sum` and its kin reach across shards.
    Without a plan, on one device, or inside another `on_shards`, `fn` itself runs.

    Differentiable: the gradient of an argument that is replicated along a mesh axis is summed along it.
    Replicated results must be equal on all shards (made so by `axis_sum` or `axis_max`); that is not checked.
    """

    def run(*args: Any) -> Any:
        plan = current_plan()
        manual = manual_axes()
        if plan is None or plan.mesh.size == 1:
            return fn(*args)
        axis_names = set(plan.mesh.axis_names) - manual
        if not axis_names:
            return fn(*args)

        def spec(entry: Any) -> Any:
            if entry is None:
                return PartitionSpec()
            if _is_axes(entry):
                return PartitionSpec(*(e if e in axis_names else None for e in plan.activation_spec(entry)))
            if isinstance(entry, dict):
                return {key: spec(value) for key, value in entry.items()}
            return type(entry)(spec(value) for value in entry)

        # Kernels know no mesh, so their loops carry values whose variation over it they do not declare: no check_vma.
        mapped = jax.shard_map(
            fn,
            in_specs=tuple(spec(entry) for entry in in_axes),
            out_specs=spec(out_axes),
            axis_names=axis_names,
            check_vma=False,
        )
        return mapped(*args)

    return run


def _manual_axis(name: str) -> str | None:
    """The mesh axis to communicate over: the one of activation axis `name`, if shards are seen one by one here."""
    plan = current_plan()
    if plan is None:
        return None
    axis = mesh_axis(name, dict(plan.activation_axes))
    return axis if axis in manual_axes() else None


def axis_sum(x: Array, name: str) -> Array:
    """Sum over the shards along logical axis `name`. Outside `on_shards` there is one shard: identity."""
    axis = _manual_axis(name)
    return x if axis is None else jax.lax.psum(x, axis)


def axis_max(x: Array, name: str) -> Array:
    """Maximum over the shards along logical axis `name`, without gradient."""
    axis = _manual_axis(name)
    x = jax.lax.stop_gradient(x)
    return x if axis is None else jax.lax.pmax(x, axis)


def axis_index(name: str) -> Array:
    """int32[]: which shard along logical axis `name` this is; 0 outside `on_shards`."""
    axis = _manual_axis(name)
    return jnp.int32(0) if axis is None else jax.lax.axis_index(axis)


def axis_size(name: str) -> int:
    """Shards along logical axis `name`; 1 outside `on_shards`."""
    axis = _manual_axis(name)
    return 1 if axis is None else jax.lax.axis_size(axis)
