"""The train state: a plain dict `{step, params, frozen, model_state, opt_state}`, parameters by role."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.sharding.placement import place
from llm_jax.sharding.plan import Plan, storage_shardings
from llm_jax.training.optimizer import Optimizer

State = dict[str, Any]
Tree = Mapping[str, Any]


def init_state(
    params: Tree,
    optimizer: Optimizer,
    declarations: Tree,
    plan: Plan,
    *,
    frozen: Tree | None = None,
    model_state: Tree | None = None,
) -> State:
    """The state of step 0, every leaf where `state_shardings` puts it.

    `params` and `frozen`: `{role: nested dict of arrays}`; `declarations` has both kinds of roles. Takes the arrays
    over: what is already in place is donated.
    """

    def make(params: Tree, frozen: Tree, model_state: Tree) -> State:
        return _state(params, optimizer, frozen, model_state)

    given = (dict(params), dict(frozen or {}), dict(model_state or {}))
    shardings = state_shardings(jax.eval_shape(make, *given), declarations, plan)
    placed = tuple(place(tree, shardings[key]) for tree, key in zip(given, ("params", "frozen", "model_state")))
    return jax.jit(make, out_shardings=shardings, donate_argnums=(0, 1, 2))(*placed)


def abstract_state(
    params: Tree,
    optimizer: Optimizer,
    declarations: Tree,
    plan: Plan,
    *,
    frozen: Tree | None = None,
    model_state: Tree | None = None,
) -> State:
    """ShapeDtypeStructs with shardings of what `init_state` makes; takes arrays or ShapeDtypeStructs."""
    like = jax.eval_shape(lambda p, f, m: _state(p, optimizer, f, m), params, frozen or {}, model_state or {})
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        state_shardings(like, declarations, plan),
    )


def _state(params: Tree, optimizer: Optimizer, frozen: Tree, model_state: Tree) -> State:
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "frozen": frozen,
        "model_state": model_state,
        "opt_state": optimizer.init(params),
    }


def state_shardings(state: Tree, declarations: Tree, plan: Plan) -> State:
    """NamedSharding of each leaf of a state (of arrays or shapes).

    Parameters and whatever of the optimizer's state has their shape lie as stored (cut over `data` in ZeRO 1-3);
    everything else is replicated. Raises KeyError for a role without declarations.
    """
    replicated = plan.sharding(PartitionSpec())

    def by_role(tree: Tree) -> dict[str, Any]:
        return {role: storage_shardings(declarations[role], leaves, plan) for role, leaves in tree.items()}

    return {
        "step": replicated,
        "params": by_role(state["params"]),
        "frozen": by_role(state["frozen"]),
        "model_state": jax.tree.map(lambda _: replicated, state["model_state"]),
        "opt_state": {
            key: by_role(value) if isinstance(value, Mapping) else jax.tree.map(lambda _: replicated, value)
            for key, value in state["opt_state"].items()
        },
    }
