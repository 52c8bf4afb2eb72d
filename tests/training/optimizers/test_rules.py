"""Each update rule against its authors' code or formula, on stacked parameters of layers of very different size.

Golden values: tests/oracles/torch_optimizers.py, layer by layer, so that they also hold stacked to apart.
"""

import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.parameter import Declaration, Init
from llm_jax.training import (
    AdafactorConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
    make_optimizer,
)
from llm_jax.training.optimizers.muon import COEFFICIENTS, orthogonalize, shape_factor
from tests.oracles.optimizers_recipe import LAYERS, LR, SHAPES, STEPS, gradient, initial
from tests.oracles.recipe import draw

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "golden" / "optimizers.json").read_text())
NORMAL = Init("normal", 1.0)
DECLS = {
    "policy": {
        "wide": Declaration(("embed", "mlp"), ((0,), (1,)), True, NORMAL).stacked(),
        "tall": Declaration(("mlp", "embed"), ((0,), (1,)), True, NORMAL).stacked(),
        "vector": Declaration(("norm",), None, True, NORMAL).stacked(),
    }
}


def stacked(value: Callable) -> dict:
    """Our layout: `[L, in, out]`."""
    rows = {name: [value(draw, name, layer) for layer in range(LAYERS)] for name in SHAPES}
    return {"policy": {name: jnp.asarray(np.stack([row.T for row in values])) for name, values in rows.items()}}


def gradients(step: int) -> dict:
    return stacked(lambda draw, name, layer: gradient(draw, name, layer, step))


def run(config: OptimizerConfig) -> list[dict[str, np.ndarray]]:
    """Values in torch's layout after each step."""
    optimizer = make_optimizer(config, DECLS, 10)
    params = stacked(initial)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    history = []
    for step in range(STEPS):
        updates, state = update(gradients(step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        turned = {
            n: np.asarray(x) if x.ndim < 3 else np.asarray(x).transpose(0, 2, 1) for n, x in params["policy"].items()
        }
        history.append(turned)
    return history


def config(**fields) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=LR, schedule="constant", clip_norm=None, **fields)


def assert_equals(history, golden, rtol=1e-5, of_update=2e-6):
    """Values, and each step's change against its own size."""
    for name, steps in golden.items():
        before = stacked(initial)["policy"][name]
        before = np.asarray(before if before.ndim < 3 else before.transpose(0, 2, 1))
        for step, want in enumerate(np.asarray(steps)):
            got = history[step][name]
            for layer in range(LAYERS):
                size = np.linalg.norm(want[layer] - before[layer])
                error = np.linalg.norm(got[layer] - want[layer])
                assert error <= max(rtol * size, of_update * np.linalg.norm(want[layer])), (name, step, layer, error)
            before = want


@pytest.mark.parametrize("kind", ["original", "match_rms_adamw"])
def test_muon_equals_torch(kind):
    muon = config(rule="muon", muon=MuonConfig(adjust_lr_fn=kind))
    assert_equals(run(muon), GOLDEN["muon"][kind])


def test_muon_in_bfloat16_is_torchs_to_its_rounding():
    muon = config(rule="muon", muon=MuonConfig(adjust_lr_fn="original", ns_dtype="bfloat16"))
    assert_equals(run(muon), GOLDEN["muon_bfloat16"], of_update=0.01)


@pytest.mark.parametrize("scaled, decay, name", [(True, 0.0, "scaled"), (False, 0.1, "absolute")])
def test_adafactor_equals_transformers(scaled, decay, name):
    adafactor = config(rule="adafactor", weight_decay=decay, adafactor=AdafactorConfig(scale_parameter=scaled))
    assert_equals(run(adafactor), GOLDEN["adafactor"][name])


@pytest.mark.parametrize("nesterov, name", [(False, "plain"), (True, "nesterov")])
def test_sgd_equals_torch(nesterov, name):
    assert_equals(run(config(rule="sgd", weight_decay=0.0, sgd=SGDConfig(nesterov=nesterov))), GOLDEN["sgd"][name])


def test_sgd_without_momentum_keeps_nothing():
    optimizer = make_optimizer(config(rule="sgd", sgd=SGDConfig(momentum=0.0)), DECLS, 10)
    params, grads = stacked(initial), gradients(0)
    assert optimizer.init(params).keys() == {"count"}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    want = jax.tree.map(lambda p, g: -LR * (g + 0.1 * p), params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, want)


def test_lion_equals_its_paper():
    """Algorithm 2 in float64: the update is a sign, so only its momentum could hide an error; three steps show it."""
    history = run(config(rule="lion", lion=LionConfig(0.9, 0.97)))
    for name in SHAPES:
        p = np.stack([initial(draw, name, layer) for layer in range(LAYERS)]).astype(np.float64)
        m = np.zeros_like(p)
        for step in range(STEPS):
            g = np.stack([gradient(draw, name, layer, step) for layer in range(LAYERS)]).astype(np.float64)
            p = p - LR * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p)
            m = 0.97 * m + 0.03 * g
            np.testing.assert_allclose(history[step][name], p, rtol=1e-5, atol=1e-6)


def test_adamw_is_what_it_was_bit_for_bit():
    """The formula as one function, as training/optimizer.py had it before there were others."""
    fields = {"learning_rate": 3e-3, "clip_norm": 1.0}
    optimizer = make_optimizer(OptimizerConfig(**fields, schedule="constant"), DECLS, 10)
    params = stacked(initial)

    def before(grads, state, params):
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, 1.0 / (norm + 1e-6))
        count = state["count"] + 1
        rate = optimizer.schedule(state["count"])
        correct1, correct2 = (1 - 0.9 ** count.astype(jnp.float32), 1 - 0.95 ** count.astype(jnp.float32))
        updates, mu, nu = {}, flatten(state["mu"]), flatten(state["nu"])
        flat_params = flatten(params)
        for path, raw in flatten(grads).items():
            g = raw.astype(jnp.float32) * scale
            mu[path] = 0.9 * mu[path] + (1 - 0.9) * g
            nu[path] = 0.95 * nu[path] + (1 - 0.95) * jnp.square(g)
            step = mu[path] / correct1 / (jnp.sqrt(nu[path] / correct2) + 1e-8)
            updates[path] = -rate * 1.0 * (step + 0.1 * flat_params[path])
        return unflatten(updates), {"count": count, "mu": unflatten(mu), "nu": unflatten(nu)}

    states, values = [optimizer.init(params)] * 2, [params] * 2
    for step in range(STEPS):
        grads = gradients(step)
        for i, update in enumerate((jax.jit(optimizer.update), jax.jit(before))):
            updates, states[i] = update(grads, states[i], values[i])
            values[i] = jax.tree.map(jnp.add, values[i], updates)
        jax.tree.map(np.testing.assert_array_equal, (states[0], values[0]), (states[1], values[1]))


# ---- Muon's formula by itself


def test_newton_schulz_is_the_polynomial_of_the_singular_values():
    """Five times p(s) = a s + b s^3 + c s^5 on the singular values of X / |X|, vectors kept; numpy, float64."""
    a, b, c = COEFFICIENTS
    assert COEFFICIENTS == (3.4445, -4.7750, 2.0315)
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 5, 8)) * np.array([1e-3, 1.0, 30.0])[:, None, None]
    for matrices in (x, x.transpose(0, 2, 1)):
        got = orthogonalize(jnp.asarray(matrices, jnp.float32))
        u, s, vt = np.linalg.svd(matrices, full_matrices=False)
        s = s / np.linalg.norm(s, axis=-1, keepdims=True)
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        np.testing.assert_allclose(got, np.einsum("nrk,nk,nkc->nrc", u, s, vt), atol=2e-5)
        assert (s > 0.65).all() and (s < 1.25).all()
    assert not np.asarray(orthogonalize(jnp.zeros((1, 3, 4)))).any(), "a gradient of 0 stays 0"


def test_newton_schulz_equals_optax():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    theirs = optax.contrib._muon.orthogonalize_via_newton_schulz(x, jnp.asarray(COEFFICIENTS), 5)  # type: ignore[attr-defined]
    np.testing.assert_allclose(orthogonalize(x[None])[0], theirs, atol=1e-5)


def test_shape_factors():
    """Jordan: rows over columns of a torch weight, that is out over in. Moonshot: an update's RMS is 0.2 as AdamW's."""
    assert shape_factor(4, 16, "original") == 2.0 and shape_factor(16, 4, "original") == 1.0
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 64, 256)), jnp.float32)
    rms = float(jnp.sqrt(jnp.mean(jnp.square(shape_factor(64, 256, "match_rms_adamw") * orthogonalize(x)))))
    assert abs(rms - 0.2) < 0.03


def test_muon_leaves_vectors_embedding_and_head_to_adamw():
    vocab = {
        "embed": Declaration(("vocab", "embed"), ((0,), (1,)), True, NORMAL),
        "head": Declaration(("embed", "vocab"), ((0,), (1,)), True, NORMAL),
    }
    rules = make_optimizer(config(rule="muon"), {"policy": {**DECLS["policy"], **vocab}}, 10).rules
    assert {path: rule.name for path, rule in rules.items()} == {
        "policy/wide": "muon",
        "policy/tall": "muon",
        "policy/vector": "adamw",
        "policy/embed": "adamw",
        "policy/head": "adamw",
    }
