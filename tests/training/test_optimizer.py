"""AdamW against torch's (tests/oracles/torch_training.py), groups, clipping."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.training import GroupConfig, OptimizerConfig, make_optimizer
from llm_jax.training.optimizer import clip_scale, global_norm
from tests.oracles.recipe import draw
from tests.training.tiny import Declared

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "training.json").read_text())
DECLS = {"policy": {"w": Declared(("embed", "mlp")), "b": Declared(("norm",), decay=False)}}
CONSTANT = OptimizerConfig(learning_rate=3e-3, schedule="constant")


def params():
    return {"policy": {name: jnp.asarray(draw(f"adamw.{name}", shape, 0)) for name, shape in SHAPES.items()}}


SHAPES = {"w": (3, 4), "b": (4,)}


def grads(step):
    scale = np.float32(10.0 if step == 1 else 0.1)
    return {"policy": {n: jnp.asarray(draw(f"adamw.{n}.grad{step}", s, 0) * scale) for n, s in SHAPES.items()}}


def test_equals_torch_adamw_and_clipping():
    optimizer = make_optimizer(CONSTANT, DECLS, 10)
    values = params()
    state = optimizer.init(values)
    for step in range(3):
        np.testing.assert_allclose(global_norm(grads(step)), GOLDEN["adamw"]["norms"][step], rtol=1e-6)
        updates, state = jax.jit(optimizer.update)(grads(step), state, values)
        values = jax.tree.map(jnp.add, values, updates)
        for name in SHAPES:
            np.testing.assert_allclose(values["policy"][name], GOLDEN["adamw"][name][step], rtol=2e-6, atol=2e-7)


def test_clip():
    assert float(clip_scale(jnp.float32(0.5), 1.0)) == 1.0
    np.testing.assert_allclose(clip_scale(jnp.float32(4.0), 1.0), 1 / (4 + 1e-6), rtol=1e-7)
    assert float(clip_scale(jnp.float32(4.0), None)) == 1.0


def test_decay_is_for_those_that_declare_it():
    optimizer = make_optimizer(CONSTANT, DECLS, 10)
    zero = jax.tree.map(jnp.zeros_like, params())
    updates, _ = optimizer.update(zero, optimizer.init(params()), params())
    np.testing.assert_allclose(updates["policy"]["w"], -3e-3 * 0.1 * params()["policy"]["w"], rtol=1e-6)
    assert not updates["policy"]["b"].any()


def test_groups_first_match_wins():
    groups = (
        GroupConfig(match="^b$", learning_rate_multiplier=0.5),
        GroupConfig(match=".*", learning_rate_multiplier=2.0, weight_decay=0.0),
    )
    config = OptimizerConfig(learning_rate=3e-3, schedule="constant", clip_norm=None, weight_decay=0.0)
    grouped = make_optimizer(OptimizerConfig(**{**config.__dict__, "groups": groups, "weight_decay": 0.1}), DECLS, 10)
    plain = make_optimizer(config, DECLS, 10)
    got, _ = grouped.update(grads(0), grouped.init(params()), params())
    want, _ = plain.update(grads(0), plain.init(params()), params())
    np.testing.assert_allclose(got["policy"]["w"], 2.0 * want["policy"]["w"], rtol=1e-6)
    np.testing.assert_allclose(got["policy"]["b"], 0.5 * want["policy"]["b"], rtol=1e-6)


def test_a_role_can_be_matched():
    config = OptimizerConfig(groups=(GroupConfig(match="^value/", learning_rate_multiplier=0.0),))
    rules = make_optimizer(config, {**DECLS, "value": DECLS["policy"]}, 10).rules
    assert rules["value/w"][:2] == (0.0, 0.0)
    assert rules["policy/w"][:2] == (1.0, 0.1) and rules["policy/b"][:2] == (1.0, 0.0)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"groups": (GroupConfig(match="nothing"),)}, "'nothing' decides over no parameter"),
        ({"groups": (GroupConfig(), GroupConfig(match="w"))}, "'w' decides over no parameter"),
        ({"groups": (GroupConfig(match="("),)}, "no regular expression"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_fields_out_of_range(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        make_optimizer(OptimizerConfig(**fields), DECLS, 10)
    assert "\n" not in str(caught.value)
