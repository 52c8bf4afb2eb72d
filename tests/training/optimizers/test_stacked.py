"""Every rule on the real decoder: stacked equals the same layers held apart, sharded equals one device, resuming."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models import Decoder, ModelConfig, declarations, init_params, layout, regroup
from llm_jax.sharding import MeshConfig, make_plan, storage_shardings, use
from llm_jax.training import GroupConfig, OptimizerConfig, init_state, make_optimizer, state_shardings

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8
)
STACKED, APART = Decoder(CONFIG), Decoder(CONFIG, segments="unrolled")
DECLS = {"policy": declarations(STACKED)}
RULES = ("adamw", "lion", "adafactor", "muon", "sgd")
STEPS = 3


def config(rule: str, **fields: Any) -> OptimizerConfig:
    return OptimizerConfig(rule=rule, learning_rate=0.01, schedule="constant", **fields)  # type: ignore[arg-type]


def gradient(step: int, params: Any) -> dict:
    """Of layers of very different size, so that a norm over several of them would be another."""
    random = np.random.default_rng(step)

    def one(path: str, p: Any) -> np.ndarray:
        g = random.normal(size=p.shape).astype(np.float32)
        return (
            g * np.float32(10.0) ** -np.arange(len(g), dtype=np.float32).reshape(-1, *[1] * (g.ndim - 1))
            if "segments" in path
            else g
        )

    return unflatten({path: one(path, p) for path, p in flatten(params).items()})


def run(optimizer, params, grads, *, plan=None, states: list | None = None):
    """Parameters and state after all steps; the state before each goes to `states`."""
    state = {"params": params, "opt_state": optimizer.init(params)}

    def step(state, g):
        updates, opt_state = optimizer.update(g, state["opt_state"], state["params"])
        return {"params": jax.tree.map(jnp.add, state["params"], updates), "opt_state": opt_state}

    shardings = None
    if plan is not None:
        whole = {"step": 0, "frozen": {}, "model_state": {}, **state}
        shardings = {key: state_shardings(whole, DECLS, plan)[key] for key in state}
        state = jax.device_put(state, shardings)
    with use(plan):
        jitted = jax.jit(step, in_shardings=(shardings, shardings and shardings["params"]), out_shardings=shardings)
        for g in grads:
            if states is not None:
                states.append(state)
            state = jitted(state, jax.device_put(g, shardings["params"]) if shardings else g)
    return state


@pytest.fixture(scope="module")
def start():
    params = {"policy": init_params(STACKED, 0)}
    return params, [gradient(step, params) for step in range(STEPS)]


def apart(tree: Any) -> Any:
    return regroup(jax.device_get(tree), layout(STACKED), layout(APART))


@pytest.mark.parametrize("rule", RULES)
def test_stacked_equals_the_same_layers_apart(rule, start):
    params, grads = start
    got = run(make_optimizer(config(rule), DECLS, 10), params, grads)
    optimizer = make_optimizer(config(rule), {"policy": declarations(APART)}, 10)
    want = jax.device_get(run(optimizer, apart(params), [apart(g) for g in grads]))
    # Whatever a rule keeps has the layers in front: parameters and state regroup alike.
    got = flatten(apart(got))
    assert got.keys() == flatten(want).keys()
    for path, value in flatten(want).items():
        np.testing.assert_allclose(got[path], value, rtol=2e-5, atol=1e-6 * np.abs(value).max(), err_msg=path)


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 3), MeshConfig(4, 2, 2), MeshConfig(2, 4, 1)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_sharded_equals_one_device(rule, mesh, start):
    params, grads = start
    optimizer = make_optimizer(config(rule), DECLS, 10)
    plan, before = make_plan(mesh), []
    got = run(optimizer, params, grads, plan=plan, states=before)
    want, earlier = run(optimizer, params, grads), flatten(params)
    for path, value in flatten(want["params"]).items():
        error = np.asarray(flatten(got["params"])[path]) - np.asarray(value)
        assert np.linalg.norm(error) <= 1e-5 * np.linalg.norm(np.asarray(value) - earlier[path]), path
    shapes = storage_shardings(DECLS["policy"], params["policy"], plan)
    for path, sharding in flatten(shapes).items():
        assert flatten(got["params"]["policy"])[path].sharding.is_equivalent_to(sharding, 3)


def test_muon_moves_matrices_and_gathers_none(start):
    """From rows over data and columns over tensor to whole matrices of some layers on each device, and back."""
    params, grads = start
    plan = make_plan(MeshConfig(4, 2, 3))
    optimizer = make_optimizer(config("muon", clip_norm=None), DECLS, 10)
    shapes = {"step": 0, "params": params, "frozen": {}, "model_state": {}, "opt_state": optimizer.init(params)}
    where = state_shardings(shapes, DECLS, plan)
    stored = (where["params"], where["opt_state"], where["params"])
    with use(plan):
        program = jax.jit(optimizer.update, in_shardings=stored, out_shardings=stored[::-1][:1] + stored[1:2])
        text = program.lower(grads[0], shapes["opt_state"], params).compile().as_text() or ""
    assert "all-to-all" in text and "all-gather" not in text


def test_factored_moments_are_cut_like_parameters_of_their_axes(start):
    plan = make_plan(MeshConfig(4, 2, 1))
    params = {"policy": init_params(STACKED, 0)}
    state = init_state(params, make_optimizer(config("adafactor"), DECLS, 10), DECLS, plan)
    path = "policy/segments/0/0/mlp/up/weight"
    rows, columns = (flatten(state["opt_state"][name])[path] for name in ("nu_rows", "nu_columns"))
    assert (rows.shape, columns.shape) == ((3, 32), (3, 64))
    assert tuple(rows.sharding.spec) == (None, "data") and tuple(columns.sharding.spec) == (None, "tensor")
    assert path not in flatten(state["opt_state"]["nu"])


def test_rules_mixed_by_group_regroup_where_layers_agree(start):
    params, grads = start
    groups = (
        GroupConfig(match="mlp", rule="lion"),
        GroupConfig(match="attention/(q|k)", rule="adafactor", weight_decay=0.0),
    )
    optimizer = make_optimizer(config("muon", groups=groups), DECLS, 10)
    names = {path.removeprefix("policy/segments/0/0/"): rule.name for path, rule in optimizer.rules.items()}
    assert names["mlp/up/weight"] == "lion" and names["attention/k/weight"] == "adafactor"
    assert names["attention/v/weight"] == "muon" and names["mlp_norm/weight"] == "lion"
    got = flatten(apart(run(optimizer, params, grads)))
    one = make_optimizer(config("muon", groups=groups), {"policy": declarations(APART)}, 10)
    want = flatten(jax.device_get(run(one, apart(params), [apart(g) for g in grads])))
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, rtol=2e-5, atol=1e-6 * np.abs(value).max(), err_msg=path)


def test_a_slot_that_only_some_layers_have_is_not_stacked():
    """Layer 1 has lion, the others muon: apart they have their own states, together they can't be one array."""
    groups = (GroupConfig(match="segments/1/", rule="lion"),)
    optimizer = make_optimizer(config("adafactor", groups=groups), {"policy": declarations(APART)}, 10)
    state = optimizer.init({"policy": init_params(APART, 0)})
    with pytest.raises(UserError, match="layers 0, 1, 2.*only some have"):
        regroup(jax.device_get(state), layout(APART), layout(STACKED))
