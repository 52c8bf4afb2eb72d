"""Layers frozen by pattern: their values keep every bit, the others train as if the frozen ones had no gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models import Decoder, ModelConfig, declarations, init_params, layout
from llm_jax.training import OptimizerConfig, make_optimizer
from llm_jax.training.optimizer import global_norm

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_layers": 4, "num_heads": 2}
DECODER = Decoder(ModelConfig(**SIZES))
DECLS = {"policy": declarations(DECODER)}
CONFIG = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant")
FREEZE = (r"^layers\.[01]\.", r"layers\.3\.attention\.q\.weight", "embed")


def optimizer(*freeze: str, **fields):
    config = OptimizerConfig(**{**CONFIG.__dict__, **fields})
    return make_optimizer(config, DECLS, 10, freeze=freeze, layouts={"policy": layout(DECODER)})


def frozen_rows(path: str) -> list[int]:
    if path.startswith("policy/embed"):
        return [0, 1, 2, 3]
    if not path.startswith("policy/segments"):
        return []
    return [0, 1, 3] if "attention/q/" in path else [0, 1]


@pytest.mark.parametrize("rule", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_frozen_layers_keep_every_bit(rule):
    params = {"policy": init_params(DECODER, 0)}
    # A negative zero is a value too.
    params["policy"]["segments"]["0"]["0"]["mlp"]["up"]["weight"] *= -0.0
    made = optimizer(*FREEZE, rule=rule)
    state = made.init(params)
    assert not any("policy/embed" in path for path in flatten(state)), "nothing is kept of what is frozen"
    trained = {path: p for path, p in flatten(params).items() if made.rules[path].multiplier}
    values = params
    for step in range(3):
        random = np.random.default_rng(step)
        grads = {path: jnp.asarray(random.normal(size=p.shape), jnp.float32) for path, p in trained.items()}
        updates, state = jax.jit(made.update)(unflatten(made.masked(grads)), state, values)
        new = {path: flatten(values)[path] + u for path, u in flatten(updates).items()}
        values = unflatten(flatten(values) | new)
    for path, before in flatten(params).items():
        after, rows = np.asarray(flatten(values)[path]), frozen_rows(path)
        if path.startswith("policy/segments"):
            for row in range(4):
                same = after[row].tobytes() == np.asarray(before[row]).tobytes()
                assert same == (row in rows), (path, row)
        else:
            assert (after.tobytes() == np.asarray(before).tobytes()) == bool(rows), path


def test_frozen_layers_count_for_nothing_in_the_norm():
    made = optimizer(r"layers\.[013]\.", "embed", "^norm", "head")
    grads = {path: jnp.ones(p.shape) for path, p in flatten({"policy": init_params(DECODER, 0)}).items()}
    kept = {path: g for path, g in grads.items() if made.rules[path].multiplier}
    per_layer = sum(g.size // 4 for path, g in grads.items() if path.startswith("policy/segments"))
    np.testing.assert_allclose(global_norm(made.masked(kept)), np.sqrt(per_layer), rtol=1e-6)


def test_a_wholly_frozen_parameter_takes_no_gradient():
    rules = optimizer("attention").rules
    assert rules["policy/segments/0/0/attention/q/weight"].multiplier == 0
    assert rules["policy/segments/0/0/mlp/up/weight"] == (1.0, 0.5, "adamw", None)
    assert optimizer(r"layers\.2\.mlp\.up").rules["policy/segments/0/0/mlp/up/weight"].frozen == (
        False,
        False,
        True,
        False,
    )


@pytest.mark.parametrize(
    "freeze, words",
    [
        ((r"layers\.4\.attention\.q\.weight",), r"matches no parameter; the nearest is layers.0.attention.q.weight"),
        (("embed", "lm_haed"), "'lm_haed' matches no parameter"),
        (("(",), "train.freeze.0 '\\(' is no regular expression"),
        ((".*",), "no parameter to train"),
    ],
)
def test_patterns_that_are_wrong(freeze, words):
    with pytest.raises(UserError, match=words) as caught:
        optimizer(*freeze)
    assert "\n" not in str(caught.value)
