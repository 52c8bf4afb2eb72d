"""Means over all batches of a run so far, which its state carries: BCO's reward shift (`running_delta`).

They are a role of their own among what no gradient moves (`model_state`): checkpoints hold them, and a resumed run goes
on from the same numbers. Of each side there are two, the mean reward and how many rewards it is of.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.models.parameter import Declaration, Init
from llm_jax.objectives.preference.bco_unpaired import Running
from llm_jax.training.terms import Objective, Pairs, Params

ROLE = "running"
SIDES = ("chosen", "rejected")
DECLARATIONS = {side: Declaration(("statistics",), None, False, Init("zeros"), learned=False) for side in SIDES}
PREFIX = f"{ROLE}/"


def nothing_yet() -> dict[str, Array]:
    """The role before the first batch."""
    return {side: jnp.zeros(2, jnp.float32) for side in SIDES}


def abstract() -> dict[str, Any]:
    return jax.eval_shape(nothing_yet)


def so_far(params: Params) -> Running:
    """What `bco_delta` goes on from."""
    return {side: (params[ROLE][side][0], params[ROLE][side][1]) for side in SIDES}


def sums(rewards: Mapping[str, Array], present: Mapping[str, Array]) -> Pairs:
    """A microbatch's part of the metrics that `carrying` reads; rewards and where they count, by side."""
    return {
        PREFIX + side: jax.lax.stop_gradient(
            (jnp.where(present[side], rewards[side], 0.0).sum(), present[side].sum().astype(jnp.float32))
        )
        for side in SIDES
    }


def carrying(objective: Objective) -> Objective:
    """An objective whose terms take `so_far` and give `sums`: after a step the means are of its batch too."""
    inner, reported = objective.moved, objective.summary

    def moved(state: Params, pairs: Pairs) -> dict[str, Any]:
        rest = {role: values for role, values in state.items() if role != ROLE}
        own = {}
        for side, (mean, count) in so_far(state).items():
            total, more = pairs[PREFIX + side]
            own[side] = jnp.stack([(mean * count + total) / jnp.maximum(count + more, 1), count + more])
        return {**(inner(rest, pairs) if inner is not None and rest else rest), ROLE: own}

    def summary(pairs: Pairs) -> Pairs:
        rest = {name: pair for name, pair in pairs.items() if not name.startswith(PREFIX)}
        return rest if reported is None else reported(rest)

    return replace(objective, moved=moved, summary=summary)
