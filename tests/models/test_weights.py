"""On a mesh: the same numbers, and no weight among what the scan keeps for the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.head import token_scores
from llm_jax.models.init import init_params
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import abstract_params, bind, declarations
from llm_jax.models.state_space import Rates
from llm_jax.sharding import make_plan, storage_shardings, use
from llm_jax.sharding.config import MeshConfig

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    init_std=0.3,
    attention_bias=True,
    tie_embeddings=True,
)
TOKENS = jax.random.randint(jax.random.key(1), (8, 12), 0, 64)
SEGMENTS = jnp.array([[1] * 7 + [2] * 5] * 8)


def loss(decoder, params):
    bound = bind(decoder, params)
    hidden, _, _ = bound(TOKENS, None, SEGMENTS)
    mask = jnp.ones(TOKENS.shape, bool).at[3, 2:].set(False)
    return -token_scores(bound, hidden, jnp.roll(TOKENS, -1, 1), mask)["logps"].sum()


@pytest.fixture(scope="module")
def expected():
    decoder = Decoder(CONFIG)
    params = init_params(decoder, 0)
    return params, jax.jit(jax.value_and_grad(lambda p: loss(decoder, p)))(params)


@pytest.mark.parametrize(
    ("data", "tensor", "zero", "remat"),
    [(8, 1, 0, "none"), (4, 2, 3, "none"), (4, 2, 2, "dots"), (2, 2, 3, "full"), (1, 1, 0, "none")],
)
def test_mesh_equals_one_device(expected, data, tensor, zero, remat):
    params, (value, grads) = expected
    decoder = Decoder(CONFIG, remat=remat)
    plan = make_plan(MeshConfig(data=data, tensor=tensor, zero=zero))
    placed = jax.device_put(params, storage_shardings(declarations(decoder), abstract_params(decoder), plan))
    with use(plan):
        sharded_value, sharded = jax.jit(jax.value_and_grad(lambda p: loss(decoder, p)))(placed)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(sharded), jax.tree.leaves(grads)):
        assert np.linalg.norm(np.asarray(ours) - theirs) <= 1e-5 * np.linalg.norm(theirs), path


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("zero", [1, 3])
def test_what_the_scan_keeps(zero, remat):
    """Activations in compute dtype, [layers, batch, length, ...] each: no weights, and with `full` only the input."""
    decoder = Decoder(CONFIG, remat=remat)
    plan = make_plan(MeshConfig(data=4, tensor=2, zero=zero), compute_dtype="bfloat16")
    with use(plan):
        grads = jax.make_jaxpr(jax.grad(lambda p: bind(decoder, p)(TOKENS)[0].astype(jnp.float32).sum()))
        program = grads(abstract_params(decoder))
    forward = next(e for e in program.eqns if e.primitive.name == "scan")
    kept: list[Any] = [v.aval for v in forward.outvars[1:]]
    weights = {v.shape for v in jax.tree.leaves(abstract_params(decoder)) if len(v.shape) == 3}
    assert not weights & {a.shape for a in kept}
    residual, wide = (3, 8, 12, 16), (3, 8, 12, 24)
    assert all(a.dtype == jnp.bfloat16 for a in kept if a.shape in (residual, wide))
    if remat != "none":
        expected = {"full": [residual], "dots": [residual] * 3 + [wide] * 2}[remat]
        assert sorted(a.shape for a in kept if a.shape in (residual, wide)) == sorted(expected)


def test_rates_of_states_stay_float32():
    """What becomes of A_log, dt_bias and D where all else is bfloat16: the numbers of their formulas, unrounded."""
    A_log, bias, skip = np.log([1.01, 16.1, 3.3]), np.array([-5.01, 0.3, 1.7]), np.array([1.001, 2.0, 0.3])
    params = {"A_log": A_log, "dt_bias": bias, "skip": skip}
    bound = bind(Rates(3, "ssm_heads", None, MambaConfig()), jax.tree.map(jnp.float32, params))
    with use(make_plan(MeshConfig(), compute_dtype="bfloat16")):
        steps, A, D = jax.jit(lambda rates: rates(jnp.zeros((1, 1, 3), jnp.bfloat16)))(bound)
    np.testing.assert_allclose(A, [-1.01, -16.1, -3.3], rtol=1e-6)
    np.testing.assert_allclose(steps[0, 0], np.log1p(np.exp(bias)), rtol=1e-6)
    np.testing.assert_allclose(D, skip, rtol=1e-6)
