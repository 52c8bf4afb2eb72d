"""A reference that follows the policy (TR-DPO), as part of the train state."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.jobs.reference import synchronised
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import OptimizerConfig, init_state, make_optimizer, make_train_step
from tests.training import tiny

DECLS = {"policy": tiny.DECLARATIONS, "ref": tiny.DECLARATIONS}


def states(alpha: float, every: int, mesh: MeshConfig, steps: int = 4) -> list[dict[str, Any]]:
    """The state at the start and after each step."""
    plan = make_plan(mesh, devices=jax.devices()[: mesh.data])
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), {"policy": tiny.DECLARATIONS}, steps)
    state = init_state({"policy": tiny.init(0)}, optimizer, DECLS, plan, frozen={"ref": tiny.init(1)})
    step = make_train_step(replace(tiny.token_mean(), synced=synchronised(alpha, every)), optimizer, plan, DECLS)
    seen = [jax.device_get(state)]
    for number in range(steps):
        # As a run that was stopped and restored before each step would have it.
        restored = jax.device_put(jax.device_get(state), jax.tree.map(lambda x: x.sharding, state))
        state, _ = step(restored, tiny.rows(number, 1))
        seen.append(jax.device_get(state))
    return seen


@pytest.mark.parametrize(("alpha", "every"), [(0.6, 2), (1.0, 2), (0.3, 1)])
def test_the_reference_is_mixed_every_so_many_steps(alpha: float, every: int):
    """Gorbatovski et al. 2024, eq. 6 (soft) and 7 (hard: alpha 1), after the step as TRL's callback."""
    seen = states(alpha, every, MeshConfig(data=1))
    for number, (before, after) in enumerate(zip(seen, seen[1:]), start=1):

        def check(was: Any, now: Any, policy: Any, number: int = number) -> None:
            if number % every:
                np.testing.assert_array_equal(now, was)
            elif alpha == 1:
                np.testing.assert_array_equal(now, policy)
            else:
                np.testing.assert_allclose(now, alpha * policy + (1 - alpha) * was, rtol=1e-6, atol=1e-7)

        jax.tree.map(check, before["frozen"]["ref"], after["frozen"]["ref"], after["params"]["policy"])


def test_the_same_where_it_is_cut_over_devices():
    one, eight = (states(0.5, 2, mesh)[-1]["frozen"] for mesh in (MeshConfig(data=1), MeshConfig(data=8, zero=3)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), eight, one)
