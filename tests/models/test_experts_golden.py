"""Equal to the blocks of transformers: the golden files of tests/oracles/transformers_experts.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.models.experts import Experts
from llm_jax.models.parameter import bind
from llm_jax.objectives import experts as losses
from tests.models.experts_cases import EXPERTS, RECIPE, TESTS, model_config, params


@pytest.mark.parametrize("name", EXPERTS)
def test_output_and_gradients(name):
    golden = np.load(TESTS / "golden" / "experts" / f"{name}.npz")
    module = Experts(model_config(name))
    tree = params(name, RECIPE.weights(name))
    x, probe = map(jnp.asarray, RECIPE.inputs(name))

    @jax.jit
    def run(tree, x):
        def loss(tree, x):
            out, statistics = bind(module, tree)(x)
            return (out * probe).sum(), (out, statistics)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(tree, x)

    (_, (out, statistics)), (grads, d_x) = run(tree, x)
    np.testing.assert_allclose(out, golden["out"], atol=1e-6 * max(1.0, np.abs(golden["out"]).max()))
    assert np.linalg.norm(d_x - golden["grad/x"]) <= 1e-5 * np.linalg.norm(golden["grad/x"])
    given = {
        key.removeprefix("grad/"): golden[key] for key in golden.files if key.startswith("grad/") and key != "grad/x"
    }
    wanted, grads = flatten(params(name, given)), flatten(grads)
    # The correction bias is a buffer over there, and has gradient 0 here.
    assert not np.any(grads.pop("router/correction", 0.0))
    assert wanted.keys() == grads.keys()
    for path, want in wanted.items():
        assert np.linalg.norm(grads[path] - want) <= 1e-5 * np.linalg.norm(want), path
    assert statistics["assigned"].sum() == RECIPE.BATCH * RECIPE.LENGTH * EXPERTS[name]["top_k"]
    assert (statistics["dropped"] > 0) == (name == "switch")


@pytest.fixture(scope="module")
def golden_losses():
    return np.load(TESTS / "golden" / "experts" / "losses.npz")


def sums(logits, mask, top_k):
    """Of one layer, as the router's docstring defines them; numpy in float64."""
    logits = np.asarray(logits, np.float64)[mask]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, -1)[:, :top_k]
    assigned = np.bincount(chosen.ravel(), minlength=logits.shape[-1])
    z = np.square(np.log(np.exp(logits).sum(-1))).sum()
    return tuple(jnp.asarray(x, jnp.float32) for x in (assigned, probs.sum(0), len(logits), z))


@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_of_all_layers(golden_losses, masked):
    logits, mask = RECIPE.logits()
    layers = [sums(layer, mask if masked else np.ones_like(mask), 2) for layer in logits]
    assigned, probability, tokens, _ = (jnp.stack(each).sum(0) for each in zip(*layers))
    got = losses.load_balance(assigned, probability, tokens)
    np.testing.assert_allclose(got, golden_losses["pooled_masked" if masked else "pooled"], rtol=1e-5)


def test_switch_losses(golden_losses):
    logits, mask = RECIPE.logits()
    rows = [sums(row, np.ones(len(row), bool), 1) for row in logits[0]]
    got = [losses.load_balance(*row[:3]) for row in rows]
    np.testing.assert_allclose(got, golden_losses["switch_per_row"], rtol=1e-5)
    _, _, tokens, z = sums(logits[0], np.ones_like(mask), 1)
    np.testing.assert_allclose(losses.router_z(z, tokens), golden_losses["z"], rtol=1e-5)
