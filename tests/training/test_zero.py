"""The real decoder on meshes, ZeRO stages and microbatches, packed rows: one device's numbers; bytes of live shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.trees import flatten, tree_bytes
from llm_jax.models import Decoder, ModelConfig, abstract_params, bind, declarations, init_params, token_scores
from llm_jax.sharding import MeshConfig, make_plan, storage_shardings
from llm_jax.training import Objective, OptimizerConfig, init_state, make_grads, make_optimizer

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8
)
DECODER = Decoder(CONFIG)
DECLS = {"policy": declarations(DECODER)}
MESHES = {
    "data8": MeshConfig(data=8),
    "data4xtensor2": MeshConfig(data=4, tensor=2),
    "data2xtensor4": MeshConfig(data=2, tensor=4),
}
ROWS, LENGTH = 32, 12


def plan_of(mesh: MeshConfig, zero: int):
    return make_plan(MeshConfig(mesh.data, mesh.tensor, zero))


def packed(microbatches: int) -> dict[str, np.ndarray]:
    """Rows of one to four documents and padding, targets in some of them only."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 64, (ROWS, LENGTH), dtype=np.int32)
    segments, positions = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.int32)
    mask = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        start = 0
        for document in range(1, rng.integers(2, 6)):
            size = int(rng.integers(2, 6))
            here = slice(start, min(start + size, LENGTH))
            segments[row, here] = document
            positions[row, here] = np.arange(size)[: len(tokens[row, here])]
            mask[row, start + size // 2 : here.stop] = rng.random() < 0.7
            start += size
    rows = {"tokens": tokens, "segment_ids": segments, "positions": positions, "mask": mask}
    return {name: x.reshape(microbatches, ROWS // microbatches, LENGTH) for name, x in rows.items()}


def scores(params, rows):
    """Negative log-likelihood by token: each token predicted by the one before it, of its document."""
    model = bind(DECODER, params["policy"])
    hidden, _, _ = model(rows["tokens"], rows["positions"], rows["segment_ids"])
    targets = jnp.roll(rows["tokens"], -1, axis=1)
    here = jnp.roll(rows["mask"], -1, axis=1) * (jnp.roll(rows["segment_ids"], -1, axis=1) == rows["segment_ids"])
    return -token_scores(model, hidden, targets, here.at[:, -1].set(0) > 0)["logps"]


def per_row(params, frozen, rows, key):
    return scores(params, rows).sum(-1)


def terms(params, frozen, rows, statistics, key):
    """The tokens' mean, each row against the batch's mean, each row against its quantile of a fixed distribution."""
    losses = scores(params, rows)
    mine, every = losses.sum(-1), statistics.everything
    rank = (statistics.values[statistics.index][:, None] > jnp.sort(every)[None]).sum(-1)
    sums = {
        "nll": losses.sum(),
        "mean": jnp.sum((mine - every.mean()) ** 2),
        "sort": jnp.sum((mine - 1.5 * rank) ** 2),
    }
    return sums, {"tokens": (rows["mask"].sum().astype(jnp.float32), jnp.float32(0))}


def weights(batch):
    rows = jnp.float32(batch["mask"].shape[0] * batch["mask"].shape[1])
    return {"nll": batch["mask"].sum().astype(jnp.float32), "mean": rows, "sort": rows}


OBJECTIVE = Objective(terms, weights, {"mean": 0.02, "sort": 0.01}, per_row)


def run(plan, microbatches):
    shardings = storage_shardings(DECLS["policy"], abstract_params(DECODER), plan)
    params = {"policy": init_params(DECODER, 0, shardings)}
    return jax.device_get(make_grads(OBJECTIVE, plan, DECLS)(params, {}, packed(microbatches)))


@pytest.fixture(scope="module")
def one_device():
    return run(plan_of(MeshConfig(data=1), 0), 1)


def assert_equal(got, want, gradients: float):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name in want[1]:
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=1e-5, err_msg=name)
    errors = {
        path: np.linalg.norm(g - w) / np.linalg.norm(w)
        for (path, g), w in zip(flatten(got[2]).items(), flatten(want[2]).values())
    }
    assert max(errors.values()) <= gradients, errors


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_equal_one_batch(one_device, microbatches):
    assert_equal(run(plan_of(MeshConfig(data=1), 0), microbatches), one_device, 2e-6)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_one_device(one_device, mesh, zero, microbatches):
    assert_equal(run(plan_of(MESHES[mesh], zero), microbatches), one_device, 1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_initial_values_are_the_same_on_every_mesh(mesh):
    plan = plan_of(MESHES[mesh], 3)
    shardings = storage_shardings(DECLS["policy"], abstract_params(DECODER), plan)
    got, want = init_params(DECODER, 0, shardings), init_params(DECODER, 0)
    for (path, a), b in zip(flatten(got).items(), flatten(want).values()):
        np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_persistent_bytes_of_live_shards(mesh, zero):
    """12 Psi on every device in stage 0 (over tensor where the table cuts), 12 Psi / N in stages 1 to 3."""
    plan = plan_of(MESHES[mesh], zero)
    optimizer = make_optimizer(OptimizerConfig(), DECLS, 10)
    shapes = abstract_params(DECODER)
    params = init_params(DECODER, 0, storage_shardings(DECLS["policy"], shapes, plan))
    state = init_state({"policy": params}, optimizer, DECLS, plan)
    held = dict.fromkeys(plan.mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    psi = sum(leaf.size for leaf in flatten(shapes).values())
    norms = sum(leaf.size for path, leaf in flatten(shapes).items() if "norm" in path)
    data, tensor = plan.mesh.shape["data"], plan.mesh.shape["tensor"]
    # Norms are not cut over tensor; two integers (step, count) are everywhere.
    spread = ((psi - norms) / tensor + norms) / (1 if zero == 0 else data)
    assert set(held.values()) == {12 * spread + 8}
    assert tree_bytes(params) == 4 * psi
