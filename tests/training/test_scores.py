"""A reward model trains as any other: packed pairs, microbatches and meshes give one device's gradients, and its head
has a place in every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.models import Decoder, HeadConfig, ModelConfig, abstract_params, bind, declarations, init_params
from llm_jax.sharding import MeshConfig, make_plan, storage_shardings
from llm_jax.training import Objective, OptimizerConfig, init_state, make_grads, make_optimizer, make_train_step

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    tie_embeddings=True,
    head=HeadConfig(labels=1),
    init_std=0.2,
)
DECODER = Decoder(CONFIG)
DECLS = {"policy": declarations(DECODER)}
ROWS, LENGTH = 16, 12


def pairs(microbatches: int) -> dict[str, np.ndarray]:
    """A row holds the chosen answer as document 1 and the rejected one as document 2."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 64, (ROWS, LENGTH), dtype=np.int32)
    segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        first, second = rng.integers(2, 6, 2)
        segments[row, : first + second] = np.repeat([1, 2], (first, second))
        positions[row, : first + second] = np.concatenate([np.arange(first), np.arange(second)])
    rows = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    return {name: x.reshape(microbatches, ROWS // microbatches, LENGTH) for name, x in rows.items()}


def terms(params, frozen, rows, statistics, key):
    """Bradley and Terry 1952."""
    model = bind(DECODER, params["policy"])
    hidden, _, _ = model(rows["tokens"], rows["positions"], rows["segment_ids"])
    scores = model.scores(hidden, rows["segment_ids"], documents=2)[..., 0]
    return {"pairs": -jax.nn.log_sigmoid(scores[:, 0] - scores[:, 1]).sum()}, {}


OBJECTIVE = Objective(terms, lambda batch: {"pairs": jnp.float32(ROWS)})


def run(mesh: MeshConfig, microbatches: int):
    plan = make_plan(mesh)
    shardings = storage_shardings(DECLS["policy"], abstract_params(DECODER), plan)
    params = {"policy": init_params(DECODER, 0, shardings)}
    return flatten(jax.device_get(make_grads(OBJECTIVE, plan, DECLS)(params, {}, pairs(microbatches))[2]))


@pytest.mark.parametrize("mesh", [MeshConfig(1), MeshConfig(4, 2, 3)], ids=["one", "data4xtensor2"])
def test_gradients_are_those_of_one_batch(mesh):
    want, got = run(MeshConfig(1), 1), run(mesh, 2)
    for path, expected in want.items():
        assert np.linalg.norm(got[path] - expected) <= 1e-5 * np.linalg.norm(expected), path
    assert np.linalg.norm(want["policy/score/weight"]) > 0


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_it_learns(rule):
    """The head is none of muon's matrices, and every pair comes out right."""
    config = OptimizerConfig(rule=rule, learning_rate=0.01, warmup_steps=0)
    optimizer = make_optimizer(config, DECLS, 30)
    assert optimizer.rules["policy/score/weight"].name == "adamw"
    plan = make_plan(MeshConfig(1))
    state = init_state({"policy": init_params(DECODER, 0)}, optimizer, DECLS, plan)
    step = make_train_step(OBJECTIVE, optimizer, plan, DECLS)
    losses = []
    for _ in range(30):
        state, metrics = step(state, pairs(1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 * losses[0]
