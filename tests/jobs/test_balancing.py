"""Balancing losses and biases of experts: those of the whole batch, on any mesh and for any number of microbatches."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.jobs.balancing import check_balancing
from llm_jax.jobs.regularization import regularization
from llm_jax.jobs.scoring import score_rows
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, ModelConfig, bind, declarations, init_params, layout
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import OptimizerConfig, TrainConfig, init_state, make_optimizer, make_train_step, weights_in_use
from llm_jax.training.config import BalancingConfig
from llm_jax.training.step import make_grads
from tests.jobs.batches import Document, document_rows

VOCAB, ROWS, WINDOW, E, K, L = 64, 16, 16, 4, 2, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_layers": L,
    "num_heads": 4,
    "init_std": 0.3,
    "embed_init_std": 1.0,
}
SWITCH = ModelConfig(**SIZES, experts=ExpertsConfig(num=E, top_k=K))
NOISY = replace(SWITCH, experts=ExpertsConfig(num=E, top_k=K, noisy=True))
BIASED = replace(SWITCH, experts=ExpertsConfig(num=E, top_k=K, scores="sigmoid", correction_bias=True))
ALL = BalancingConfig(load_balance=0.1, sequence_balance=0.2, router_z=0.05, importance=0.3)
FURTHER = replace(BIASED, mtp=2)
MODELS = {"switch": (SWITCH, ALL), "noisy": (NOISY, replace(ALL, load=0.4)), "further": (FURTHER, ALL)}


def rows(microbatches: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    lengths = [random.multinomial(WINDOW - row % 5, [0.5, 0.3, 0.2]) for row in range(ROWS)]
    documents = [[Document(random.integers(VOCAB, size=n), np.ones(n, bool)) for n in e if n] for e in lengths]
    return {n: x.reshape(microbatches, -1, *x.shape[1:]) for n, x in document_rows(documents, WINDOW).items()}


def objective_of(model: ModelConfig, balancing: BalancingConfig):
    decoder = Decoder(model)
    train = TrainConfig(balancing=balancing, mtp_weight=0.3 if model.mtp else 0.0)
    extra = regularization(train, decoder.config)
    return decoder, sft_objective(decoder, extra)


def grads(name: str, mesh: MeshConfig, microbatches: int):
    decoder, objective = objective_of(*MODELS[name])
    plan = make_plan(mesh, devices=jax.devices()[: mesh.data * mesh.tensor])
    declared = {"policy": declarations(decoder)}
    state = init_state({"policy": init_params(decoder, 0)}, optimizer_of(decoder), declared, plan)
    found = make_grads(objective, plan, declared)(weights_in_use(state), {}, numbered(microbatches, objective))
    return jax.device_get(found)


def numbered(microbatches: int, objective) -> dict[str, Any]:
    batch = rows(microbatches)
    return (
        {**batch, "example": np.arange(ROWS, dtype=np.int32).reshape(microbatches, -1)} if objective.random else batch
    )


def optimizer_of(decoder: Decoder):
    config = OptimizerConfig(schedule="constant", weight_decay=0.5)
    return make_optimizer(config, {"policy": declarations(decoder)}, 10)


@pytest.fixture(scope="module", params=list(MODELS))
def one(request):
    return request.param, grads(request.param, MeshConfig(1), 1)


@pytest.mark.parametrize("mesh, microbatches", [(MeshConfig(1), 2), (MeshConfig(1), 4), (MeshConfig(4, 2, 3), 2)])
def test_the_same_on_any_mesh_and_for_any_microbatches(one, mesh, microbatches):
    name, (loss, metrics, want) = one
    got_loss, got_metrics, got = grads(name, mesh, microbatches)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6)
    assert got_metrics.keys() == metrics.keys()
    for metric, value in metrics.items():
        np.testing.assert_allclose(got_metrics[metric], value, rtol=1e-5, atol=1e-7, err_msg=metric)
    for path, g in flatten(want).items():
        if not path.endswith("correction"):
            error = np.linalg.norm(flatten(got)[path] - g) / np.linalg.norm(g)
            assert error <= 1e-5, (path, error)


def test_equals_the_papers_formulas_on_the_whole_batch():
    """Written out over all tokens at once: counts without gradient, everything else with."""
    decoder, objective = objective_of(SWITCH, ALL)
    params = init_params(decoder, 0)
    batch = {name: x[0] for name, x in rows(1).items()}

    def loss(params):
        scores, mask = score_rows(bind(decoder, params), batch, ("logps",))
        router = scores["experts"]
        shares = jax.lax.stop_gradient(router["assigned"]) / router["tokens"][:, None]
        switch = E * jnp.sum(shares * router["probability"] / router["tokens"][:, None], -1)
        variation = jnp.var(router["importance"], -1) / jnp.mean(router["importance"], -1) ** 2
        sequence = E / K * router["sequence_product"] / router["sequences"]
        z = router["z"] / router["tokens"]
        nll = -jnp.where(mask, scores["logps"], 0.0).sum() / mask.sum()
        return nll + jnp.mean(0.1 * switch + 0.3 * variation + 0.2 * sequence + 0.05 * z)

    value, want = jax.jit(jax.value_and_grad(loss))(params)
    got_loss, metrics, got = grads("switch", MeshConfig(1), 1)
    np.testing.assert_allclose(got_loss, value, rtol=1e-6)
    assert {"loss/nll", *(f"loss/{name}" for name in objective.coefficients)} <= metrics.keys()
    for path, g in flatten(want).items():
        assert np.linalg.norm(flatten(got["policy"])[path] - g) <= 1e-5 * np.linalg.norm(g), path


def test_further_layers_count_their_own_tokens_and_documents():
    """Documents of one token have none ahead: the layers' sums are divided by different numbers."""
    config = replace(SWITCH, mtp=1)
    decoder, objective = objective_of(config, BalancingConfig(sequence_balance=1.0, router_z=1.0))
    lengths = [[1, 1, 5, 1], [6, 2]]
    random = np.random.default_rng(1)
    documents = [[Document(random.integers(VOCAB, size=n), np.ones(n, bool)) for n in row] for row in lengths]
    found = document_rows(documents, WINDOW)
    params = init_params(decoder, 0)
    routers = score_rows(bind(decoder, params), found, ("logps",), further=True)[0]["experts"]
    plan, declared = make_plan(MeshConfig(1), devices=jax.devices()[:1]), {"policy": declarations(decoder)}
    for k in (1, 2):
        batch = {name: x.reshape(k, -1, *x.shape[1:]) for name, x in found.items()}
        _, metrics, _ = make_grads(objective, plan, declared)({"policy": params}, {}, batch)
        z, balance = routers["z"] / routers["tokens"], E / K * routers["sequence_product"] / routers["sequences"]
        np.testing.assert_allclose(metrics["loss/router_z"], np.mean(z), rtol=1e-5)
        np.testing.assert_allclose(metrics["loss/sequence_balance"], np.mean(balance), rtol=1e-5)


def test_padding_alone_counts_for_nothing():
    decoder, objective = objective_of(FURTHER, ALL)
    plan, declared = make_plan(MeshConfig(1), devices=jax.devices()[:1]), {"policy": declarations(decoder)}
    batch = jax.tree.map(np.zeros_like, rows(1))
    loss, _, found = make_grads(objective, plan, declared)({"policy": init_params(decoder, 0)}, {}, batch)
    assert loss == 0 and all(not np.any(g) for g in jax.tree.leaves(found))


def test_frozen_biases_stay():
    decoder, objective = objective_of(BIASED, BalancingConfig(bias_rate=0.01))
    plan, declared = make_plan(MeshConfig(1), devices=jax.devices()[:1]), {"policy": declarations(decoder)}
    layouts = {"policy": layout(decoder)}
    freeze = (r"layers\.1\.mlp\.router\.correction",)
    optimizer = make_optimizer(OptimizerConfig(), declared, 10, freeze=freeze, layouts=layouts)
    state = init_state({"policy": init_params(decoder, 0)}, optimizer, declared, plan)
    state, _ = make_train_step(objective, optimizer, plan, declared)(state, rows(1))
    (bias,) = jax.tree.leaves(jax.device_get(state["model_state"]))
    assert np.abs(bias[0]).max() > 0 and not np.any(bias[1])


def test_loads_are_reported_of_the_whole_batch():
    decoder, _ = objective_of(SWITCH, ALL)
    batch = {name: x[0] for name, x in rows(1).items()}
    scores, _ = score_rows(bind(decoder, init_params(decoder, 0)), batch, ("logps",))
    assigned = np.asarray(scores["experts"]["assigned"])
    _, metrics, _ = grads("switch", MeshConfig(1), 4)
    load = assigned * E / assigned.sum(-1, keepdims=True)
    np.testing.assert_allclose(assigned.sum(-1), K * (batch["segment_ids"] > 0).sum())
    np.testing.assert_allclose(metrics["experts/load_max"], load.max(-1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["experts/load_min"], load.min(-1).mean(), rtol=1e-6)
    np.testing.assert_allclose([metrics[f"experts/load/{e:03}"] for e in range(E)], load.mean(0), rtol=1e-6)
    assert metrics["experts/dropped"] == 0 and 0 < metrics["experts/entropy"] <= np.log(E)


@pytest.mark.parametrize(
    "model, mesh, microbatches",
    [(BIASED, MeshConfig(1), 1), (FURTHER, MeshConfig(1), 2), (BIASED, MeshConfig(4, 2, 3), 2)],
)
def test_biases_move_by_load_and_by_nothing_else(model, mesh, microbatches):
    rate = 0.01
    decoder, objective = objective_of(model, BalancingConfig(bias_rate=rate))
    plan = make_plan(mesh, devices=jax.devices()[: mesh.data * mesh.tensor])
    declared, optimizer = {"policy": declarations(decoder)}, optimizer_of(decoder)
    params = init_params(decoder, 0)
    state = init_state({"policy": params}, optimizer, declared, plan, ema=True)
    paths = [path for path in flatten(params) if path.endswith("correction")]
    assert len(paths) == 1 + model.mtp
    whole = [flatten(state[part]) for part in ("params", "ema", "opt_state")]
    assert not any(name.endswith("correction") for part in whole for name in part)
    step = make_train_step(objective, optimizer, plan, declared, ema_decay=0.5)
    bias = np.zeros((L + model.mtp, E), np.float32)
    for _ in range(3):
        batch = {name: x[0] for name, x in rows(1).items()}
        weights = jax.tree.map(jnp.asarray, jax.device_get(weights_in_use({**state, "ema": state["params"]})["policy"]))
        scores, _ = score_rows(bind(decoder, weights), batch, ("logps",), further=model.mtp > 0)
        assigned = np.asarray(scores["experts"]["assigned"])
        bias = bias + np.float32(rate) * np.sign(assigned.mean(-1, keepdims=True) - assigned)
        state, _ = step(state, rows(microbatches))
        moved = [np.asarray(flatten(weights_in_use(state)["policy"])[path]).reshape(-1, E) for path in paths]
        np.testing.assert_array_equal(np.concatenate(sorted(moved, key=len, reverse=True)), bias.astype(np.float32))
    assert np.abs(bias).max() > 0


@pytest.mark.parametrize(
    "fields, model, says",
    [
        ({"load_balance": -0.1}, SWITCH, "train.balancing.load_balance is -0.1"),
        ({"router_z": float("nan")}, SWITCH, "train.balancing.router_z is nan"),
        ({"load_balance": 0.1}, ModelConfig(vocab_size=8), "no experts"),
        ({"load": 0.1}, SWITCH, "noisy"),
        ({"bias_rate": 0.001}, SWITCH, "correction_bias"),
    ],
)
def test_what_a_model_has_no_use_for_is_refused(fields, model, says):
    with pytest.raises(UserError, match=says):
        check_balancing(BalancingConfig(**fields), model)
