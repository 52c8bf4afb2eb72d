"""Initial values depend on seed and path: equal on every mesh and under every grouping."""

from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder, layout
from llm_jax.models.init import init_params
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.models.segments import regroup
from llm_jax.sharding import make_plan, storage_shardings
from llm_jax.sharding.config import MeshConfig

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=4, num_heads=4, num_kv_heads=2, attention_bias=True
)


@pytest.fixture(scope="module")
def expected():
    return jax.tree.map(np.asarray, init_params(Decoder(CONFIG), 0))


@pytest.mark.parametrize(("data", "tensor", "zero"), [(8, 1, 0), (8, 1, 3), (4, 2, 1), (4, 2, 3)])
def test_equal_on_every_mesh(expected, data, tensor, zero):
    decoder = Decoder(CONFIG)
    plan = make_plan(MeshConfig(data=data, tensor=tensor, zero=zero))
    shardings = storage_shardings(declarations(decoder), abstract_params(decoder), plan)
    params = init_params(decoder, 0, shardings)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    placed = params["segments"]["0"]["0"]["mlp"]["up"]["weight"]
    pieces = tensor * (data if zero else 1)
    assert placed.addressable_shards[0].data.size * pieces == placed.size


@pytest.mark.parametrize("grouping", ["unrolled", [1, 3]])
def test_equal_under_every_grouping(expected, grouping):
    other = Decoder(CONFIG, segments=grouping)
    jax.tree.map(
        np.testing.assert_array_equal, init_params(other, 0), regroup(expected, layout(Decoder(CONFIG)), layout(other))
    )


def test_distribution(expected):
    """N(0, 0.02^2), independent between layers and parameters; norms one, biases zero."""
    block = expected["segments"]["0"]["0"]
    for weight in (expected["embed"]["weight"], block["mlp"]["up"]["weight"], block["attention"]["q"]["weight"]):
        assert abs(weight.std() / 0.02 - 1) < 5 / np.sqrt(2 * weight.size)
        assert abs(weight.mean() / 0.02) < 5 / np.sqrt(weight.size)
    gate, up = (block["mlp"][name]["weight"].reshape(4, -1) for name in ("gate", "up"))
    correlations = np.corrcoef(np.concatenate([gate, up])) - np.eye(8)
    assert np.abs(correlations).max() < 5 / np.sqrt(gate.shape[1])
    assert (block["attention_norm"]["weight"] == 1).all() and (block["attention"]["q"]["bias"] == 0).all()
    other = init_params(Decoder(CONFIG), 1)
    assert (np.asarray(other["embed"]["weight"]) != expected["embed"]["weight"]).any()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_states_fade_as_published(kind):
    """A at -1, -2, …; steps log-uniform in [0.001, 0.1] (median 0.01); the input itself added once."""
    heads: dict[str, Any] = {"dt_rank": 3} if kind == "mamba" else {"num_heads": 800}
    mamba = MambaConfig(inner_size=800, state_size=5, **heads)
    fields: dict[str, Any] = {"mixers": (kind,), "feed_forwards": ("none",), "positions": "none", "mamba": mamba}
    decoder = Decoder(ModelConfig(family="llm_jax", vocab_size=8, hidden_size=8, num_heads=1, num_layers=1, **fields))
    rates = init_params(decoder, 0)["segments"]["0"]["0"][kind]["rates"]
    counted = np.arange(1, rates["A_log"].shape[-1] + 1)
    np.testing.assert_allclose(np.exp(rates["A_log"]), np.broadcast_to(counted, rates["A_log"].shape), rtol=1e-5)
    np.testing.assert_array_equal(rates["skip"], 1.0)
    steps = np.log10(np.asarray(jax.nn.softplus(rates["dt_bias"])))
    assert steps.min() > -3.001 and steps.max() < -0.999
    np.testing.assert_allclose(np.quantile(steps, [0.25, 0.5, 0.75]), [-2.5, -2.0, -1.5], atol=0.12)
