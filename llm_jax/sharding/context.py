"""The plan that is in force while a program is traced, and `constrain`, the only way to constrain an activation."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from llm_jax.sharding.plan import Plan

# A context that jit's caches know: a function traced under one plan is traced anew under another.
_PLAN = jax.make_user_context(default_value=None)


def current_plan() -> Plan | None:
    """The plan set by `use`, or None."""
    return _PLAN.value


@contextlib.contextmanager
def use(plan: Plan | None) -> Iterator[Plan | None]:
    """Puts a plan in force: sets jax's mesh, and what `constrain`, `on_shards` and `compute_weights` read.

    None, or the plan already in force, changes nothing (jax does not let a mesh be set inside of jit).
    """
    if plan is None or plan is current_plan():
        yield plan
        return
    with jax.set_mesh(plan.mesh), _PLAN(plan):
        yield plan


def manual_axes() -> frozenset[str]:
    """Mesh axes whose shards the code being traced sees one by one (inside `on_shards`)."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def constrain_spec(x: Array, spec: PartitionSpec) -> Array:
    """`with_sharding_constraint` by a bare spec, less the axes that are manual here."""
    plan = current_plan()
    manual = manual_axes()
    if plan is None or plan.mesh.size == 1 or manual >= set(plan.mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None if e in manual else e for e in spec)))


def constrain(x: Array, names: Sequence[str | None]) -> Array:
    """Spreads an activation as its logical axis names say; a name of None, or one the table does not cut, is whole.

    Identity without a plan. Mesh axes that are manual in the current context are left out.
    Raises ValueError where the number of names is not the rank, a name is unknown, or two share a mesh axis.
    """
    plan = current_plan()
    if plan is None:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {tuple(names)} for an array of shape {x.shape}")
    return constrain_spec(x, plan.activation_spec(names))
