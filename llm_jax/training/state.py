"""The train state: a plain dict `{step, params, frozen, model_state, opt_state}`, parameters by role.

`params` is what the optimizer trains, `model_state` the trained roles' parameters that it does not (see `model_state`).
With a moving average of the weights also `ema`, which has the shape of `params`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.base.trees import flatten, unflatten
from llm_jax.sharding.placement import place
from llm_jax.sharding.plan import Plan, storage_shardings
from llm_jax.training.model_state import join, split
from llm_jax.training.optimizer import Optimizer
from llm_jax.training.optimizers.rule import slot_axes

State = dict[str, Any]
Tree = Mapping[str, Any]


def init_state(
    params: Tree,
    optimizer: Optimizer,
    declarations: Tree,
    plan: Plan,
    *,
    frozen: Tree | None = None,
    ema: bool = False,
) -> State:
    """The state of step 0, every leaf where `state_shardings` puts it.

    `params` and `frozen`: `{role: nested dict of arrays}`; `declarations` has both kinds of roles. Takes the arrays
    over: what is already in place is donated. `ema`: whether to keep a moving average, which starts at `params`.
    """

    def make(params: Tree, frozen: Tree, model_state: Tree) -> State:
        return _state(params, optimizer, frozen, model_state, ema)

    learned, model_state = split(params, declarations)
    given = (learned, dict(frozen or {}), model_state)
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
    ema: bool = False,
) -> State:
    """ShapeDtypeStructs with shardings of what `init_state` makes; takes arrays or ShapeDtypeStructs."""
    learned, model_state = split(params, declarations)
    like = jax.eval_shape(lambda p, f, m: _state(p, optimizer, f, m, ema), learned, frozen or {}, model_state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        state_shardings(like, declarations, plan),
    )


def _state(params: Tree, optimizer: Optimizer, frozen: Tree, model_state: Tree, ema: bool) -> State:
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "frozen": frozen,
        "model_state": model_state,
        "opt_state": optimizer.init(params),
    }
    return {**state, "ema": jax.tree.map(jnp.copy, params)} if ema else state


def weights_in_use(state: Tree) -> Tree:
    """Whole parameters of the trained roles as evaluation, samples and export take them: where there is a moving
    average, of what the optimizer trains that."""
    return join(state.get("ema", state["params"]), state["model_state"])


def state_shardings(state: Tree, declarations: Tree, plan: Plan) -> State:
    """NamedSharding of each leaf of a state (of arrays or shapes).

    Parameters, their average and what the optimizer keeps of them lie as stored (cut over `data` in ZeRO 1-3): a
    slot of fewer axes, such as the sums over rows of a factored moment, as a parameter of those axes would. Everything
    else is replicated. Raises KeyError for a role without declarations.
    """
    replicated = plan.sharding(PartitionSpec())

    learned, _ = split(declarations, declarations)

    def by_role(tree: Tree, declared: Tree) -> dict[str, Any]:
        return {role: storage_shardings(declared[role], leaves, plan) for role, leaves in tree.items()}

    declared = flatten(declarations)

    def slots(name: str, tree: Tree) -> dict[str, Any]:
        return unflatten(
            {
                path: plan.storage_sharding(slot_axes(name, declared[path]), leaf.shape)
                for path, leaf in flatten(tree).items()
            }
        )

    shardings = {
        "step": replicated,
        "params": by_role(state["params"], learned),
        "frozen": by_role(state["frozen"], declarations),
        "model_state": jax.tree.map(lambda _: replicated, state["model_state"]),
        "opt_state": {
            key: slots(key, value) if isinstance(value, Mapping) else jax.tree.map(lambda _: replicated, value)
            for key, value in state["opt_state"].items()
        },
    }
    return {**shardings, "ema": by_role(state["ema"], learned)} if "ema" in state else shardings
