"""Learning rates, step by step, against transformers' schedules (tests/oracles/schedules.py)."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.training import OptimizerConfig, make_schedule

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "schedules.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: "-".join(map(str, c["config"].values())))
def test_equals_transformers(case):
    config = OptimizerConfig(learning_rate=GOLDEN["peak"], **case["config"])
    rates = make_schedule(config, case["steps"])(jnp.arange(case["steps"]))
    np.testing.assert_allclose(rates, case["rates"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_ends(schedule):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=10, final_fraction=0.2)
    rate = make_schedule(config, 100)
    assert float(rate(jnp.int32(0))) == 0.0
    assert float(rate(jnp.int32(5))) == 0.5
    assert float(rate(jnp.int32(10))) == 1.0
    last = 1.0 if schedule == "constant" else 0.2
    np.testing.assert_allclose(rate(jnp.array([100, 150, 100000])), last, rtol=1e-6)


def test_wsd_decays_over_a_fifth_by_default():
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="wsd"), 50)
    np.testing.assert_allclose(rate(jnp.array([40, 45, 50])), [1.0, 0.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"warmup_steps": 60}, "warmup_steps is 60"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"final_fraction": 1.5}, "final_fraction is 1.5"),
        ({"schedule": "wsd", "warmup_steps": 20, "decay_steps": 40}, "decay_steps is 40"),
    ],
)
def test_lengths_that_do_not_fit(fields, words):
    with pytest.raises(UserError, match=words):
        make_schedule(OptimizerConfig(**fields), 50)
