"""The step on meshes, stages and microbatches against one device: losses, gradients, states."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import (
    GroupConfig,
    OptimizerConfig,
    abstract_state,
    evaluate,
    init_state,
    make_eval_step,
    make_grads,
    make_optimizer,
    make_train_step,
)
from tests.training import tiny

DECLS = {"policy": tiny.DECLARATIONS, "ref": tiny.DECLARATIONS}
MESHES = {
    "data8": MeshConfig(data=8),
    "data4xtensor2": MeshConfig(data=4, tensor=2),
    "data2xtensor4": MeshConfig(data=2, tensor=4),
}
ONE = MeshConfig(data=1)


def plan_of(mesh: MeshConfig, zero: int, dtype: str = "float32"):
    return make_plan(MeshConfig(mesh.data, mesh.tensor, zero), compute_dtype=dtype)


def grads_of(objective, plan, microbatches, params=None):
    params = params or {"policy": tiny.init(0)}
    return make_grads(objective, plan, DECLS)(params, {"ref": tiny.init(1)}, tiny.rows(3, microbatches))


def assert_close(got, want, gradients: float, loss: float = 1e-5):
    np.testing.assert_allclose(got[0], want[0], rtol=loss)
    for name in want[1]:
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=1e-5, err_msg=name)

    def close(a, b):
        assert a.dtype == jnp.float32
        error = np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))
        assert error <= gradients, error

    jax.tree.map(close, got[2], want[2])


@pytest.fixture(scope="module", params=["token_mean", "several"])
def objective(request):
    return getattr(tiny, request.param)()


@pytest.fixture(scope="module")
def one_device(objective):
    return jax.device_get(grads_of(objective, plan_of(ONE, 0), 1))


def test_one_device_equals_plain_jax(objective, one_device):
    """The reference itself: no plan, no slots, no microbatches, the formula written out."""
    rows = {name: x[0] for name, x in tiny.rows(3, 1).items()}

    def loss(policy):
        losses = tiny.nll(policy, rows)
        total = losses.sum() / rows["mask"].sum()
        if objective.batch_statistics is not None:
            mine = losses.sum(-1)
            still = jax.lax.stop_gradient(mine)
            other = tiny.nll(tiny.init(1), rows).sum(-1)
            rank = (still[:, None] > still[None]).sum(-1)
            total += 0.02 * jnp.mean((mine - still.mean()) ** 2) + 0.01 * jnp.mean((mine - jnp.sort(other)[rank]) ** 2)
        return total

    value, grads = jax.jit(jax.value_and_grad(loss))(tiny.init(0))
    np.testing.assert_allclose(one_device[0], value, rtol=1e-6)
    chex.assert_trees_all_close(one_device[2]["policy"], grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_equal_one_batch(objective, one_device, microbatches):
    assert_close(grads_of(objective, plan_of(ONE, 0), microbatches), one_device, gradients=2e-6, loss=1e-6)


# All stages, meshes and microbatches, on the real decoder: test_zero.py.
@pytest.mark.parametrize(
    "mesh, zero, microbatches",
    [("data8", 0, 1), ("data8", 1, 4), ("data4xtensor2", 2, 2), ("data2xtensor4", 0, 2), ("data2xtensor4", 3, 4)],
)
def test_sharded_equals_one_device(objective, one_device, mesh, zero, microbatches):
    plan = plan_of(MESHES[mesh], zero)
    got = grads_of(objective, plan, microbatches)
    assert_close(got, one_device, gradients=1e-5)
    for role in got[2].values():
        up = role["layers"]["up"]
        assert up.sharding.is_equivalent_to(plan.sharding(plan.gradient_spec(("layers", "embed", "mlp"), up.shape)), 3)


def state_of(plan, config=None, steps=10):
    optimizer = make_optimizer(config or OptimizerConfig(warmup_steps=2), {"policy": tiny.DECLARATIONS}, steps)
    params, frozen = {"policy": tiny.init(0)}, {"ref": tiny.init(1)}
    return optimizer, init_state(params, optimizer, DECLS, plan, frozen=frozen)


def run_steps(plan, microbatches=1, steps=4, objective=None, config=None):
    objective = objective or tiny.several()
    optimizer, state = state_of(plan, config)
    step = make_train_step(objective, optimizer, plan, DECLS)
    history = []
    for s in range(steps):
        state, metrics = step(state, tiny.rows(10 + s, microbatches))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@pytest.fixture(scope="module")
def four_steps():
    return run_steps(plan_of(ONE, 0))


@pytest.mark.parametrize(
    "mesh, zero, microbatches", [("data8", 1, 4), ("data4xtensor2", 2, 2), ("data2xtensor4", 3, 4)]
)
def test_training_equals_one_device(four_steps, mesh, zero, microbatches):
    state, history = run_steps(plan_of(MESHES[mesh], zero), microbatches)
    for got, want in zip(history, four_steps[1]):
        assert got.keys() == want.keys() and {"loss", "loss/nll", "grad_norm", "learning_rate", "finite"} <= got.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=2e-5, err_msg=name)
    chex.assert_trees_all_close(state["params"], four_steps[0]["params"], rtol=1e-4, atol=2e-6)
    assert int(state["step"]) == 4 and int(state["opt_state"]["count"]) == 4


def test_one_program_and_the_state_stays_where_it_is():
    plan = plan_of(MESHES["data4xtensor2"], 2)
    optimizer, state = state_of(plan)
    traced: Any = chex.assert_max_traces(tiny.token_mean().terms, n=1)
    objective = tiny.Objective(traced, tiny.token_mean().weights)
    step = make_train_step(objective, optimizer, plan, DECLS)
    like = abstract_state({"policy": tiny.init(0)}, optimizer, DECLS, plan, frozen={"ref": tiny.init(1)})
    for s in range(3):
        before = state
        state, _ = step(state, tiny.rows(s, 2))
        assert jax.tree.leaves(before)[0].is_deleted(), "the state is donated"
        chex.assert_trees_all_equal(
            jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), state),
            jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), like),
        )


@pytest.mark.parametrize("zero, microbatches", [(0, 1), (2, 2), (3, 1)])
def test_a_step_that_is_not_finite_changes_nothing(zero, microbatches):
    plan = plan_of(MESHES["data8"], zero)
    optimizer, state = state_of(plan)
    step = make_train_step(tiny.token_mean(), optimizer, plan, DECLS)
    state, metrics = step(state, tiny.rows(0, microbatches))
    assert metrics["finite"]
    before = jax.device_get(state)
    bad = tiny.rows(1, microbatches)
    bad["mask"][0, 3] = np.inf
    state, metrics = step(state, bad)
    assert not metrics["finite"] and not np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal(jax.device_get(state), before)


def test_a_single_microbatch_builds_no_loop():
    plan = plan_of(ONE, 0)
    optimizer, state = state_of(plan)

    def loops(microbatches):
        program = make_train_step(tiny.token_mean(), optimizer, plan, DECLS)
        return program.lower(state, tiny.rows(0, microbatches)).as_text().count("stablehlo.while")

    assert loops(1) == 2, "one loop over layers, forward and backward"
    assert loops(2) == 3


def test_terms_must_have_weights():
    objective = tiny.Objective(tiny.token_mean().terms, lambda batch: {"nil": jnp.float32(1)})
    with pytest.raises(ValueError, match="nll.*nil"):
        grads_of(objective, plan_of(ONE, 0), 1)


def test_a_batch_without_targets_has_loss_zero():
    rows = tiny.rows(0, 1)
    rows["mask"] *= 0
    loss, _, grads = make_grads(tiny.token_mean(), plan_of(ONE, 0), DECLS)({"policy": tiny.init(0)}, {}, rows)
    assert float(loss) == 0 and all(not g.any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("zero", [0, 3])
def test_evaluation_is_over_all_tokens_of_all_batches(zero):
    plan = plan_of(MESHES["data8"], zero)
    _, state = state_of(plan)
    objective = tiny.token_mean()
    batches = [tiny.rows(s, 2) for s in range(3)]
    values = evaluate(make_eval_step(objective, plan, DECLS), objective, state, batches)
    sums = [float(tiny.nll(tiny.init(0), {k: x.reshape(-1, tiny.T) for k, x in b.items()}).sum()) for b in batches]
    np.testing.assert_allclose(values["loss"], sum(sums) / sum(b["mask"].sum() for b in batches), rtol=1e-5)
    assert values["rows"] == sum((b["mask"].sum(-1) > 0).sum() for b in batches), "counts are summed, not divided"


@pytest.mark.parametrize("zero", [1, 3])
def test_bfloat16_accumulates_in_float32(zero):
    """Gradients of bfloat16 compute are not rounded again on their way into the float32 sum."""
    plan = plan_of(MESHES["data8"], zero, "bfloat16")
    loss, _, grads = grads_of(tiny.token_mean(), plan, 4)
    want = grads_of(tiny.token_mean(), plan_of(ONE, 0), 1)
    np.testing.assert_allclose(loss, want[0], rtol=0.02)
    for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want[2])):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(np.asarray(got) - np.asarray(exact)) / np.linalg.norm(np.asarray(exact)) < 0.03
    rounded = jax.tree.map(lambda g: bool((g.astype(jnp.bfloat16).astype(jnp.float32) == g).all()), grads)
    assert not any(jax.tree.leaves(rounded))


@pytest.mark.parametrize("microbatches, zero", [(1, 1), (2, 3)])
def test_frozen_groups_stay_and_count_for_nothing(microbatches, zero):
    config = OptimizerConfig(groups=(GroupConfig(match="^(embed|layers/up)", learning_rate_multiplier=0.0),))
    plan = plan_of(MESHES["data8"], zero)
    state, history = run_steps(plan, microbatches, 2, tiny.token_mean(), config)
    before, after = tiny.init(0), state["params"]["policy"]
    chex.assert_trees_all_equal(after["embed"], jax.device_get(before["embed"]))
    chex.assert_trees_all_equal(after["layers"]["up"], jax.device_get(before["layers"]["up"]))
    assert (after["layers"]["down"] != before["layers"]["down"]).all() and "embed" not in state["opt_state"]["mu"][
        "policy"
    ]
    full = make_grads(tiny.token_mean(), plan, DECLS)({"policy": before}, {}, tiny.rows(10, microbatches))[2]["policy"]
    counted = [full["layers"]["norm"], full["layers"]["down"], full["head"]["weight"]]
    np.testing.assert_allclose(history[0]["grad_norm"], np.sqrt(sum(float((g**2).sum()) for g in counted)), rtol=1e-5)
