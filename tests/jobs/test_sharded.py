"""The real decoder under the jobs' objectives: meshes, ZeRO stages and microbatches against one device."""

from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.terms import sft_objective
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.init import init_params
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.plan import make_plan, storage_shardings
from llm_jax.training.step import make_grads
from tests.jobs.batches import Document, Pair, document_rows, pair_rows

VOCAB, ROWS, WINDOW = 64, 32, 32
DPO = preference_loss(PreferenceConfig(beta=0.3, label_smoothing=0.1))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(
        ModelConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            init_std=0.2,
            embed_init_std=1.0,
        )
    )


def batches() -> dict[str, dict[str, Any]]:
    """Rows of uneven documents, masks and numbers of pairs; the last rows are all padding."""
    random = np.random.default_rng(0)
    documents, pairs = [], []
    for row in range(ROWS - 2):
        lengths = random.multinomial(WINDOW - 3 - row % 5, [0.5, 0.3, 0.2])
        documents.append([Document(random.integers(VOCAB, size=n), random.random(n) < 0.2 + row / 40) for n in lengths])
        sizes = [(2, 3, 5), (1, 7, 4)][: row % 3]
        pairs.append([Pair(*(list(random.integers(VOCAB, size=n)) for n in each)) for each in sizes])
    sft = document_rows([*documents, [], []], WINDOW)
    return {"sft": sft, "dpo": pair_rows([*pairs, [], []], WINDOW, most_pairs=2)}


BATCHES = batches()


def grads_of(decoder: Decoder, kind: str, mesh: MeshConfig, microbatches: int) -> tuple[Any, dict, dict]:
    """Loss, metrics, and gradients by path of the batch cut into microbatches, on a mesh."""
    plan = make_plan(mesh, devices=jax.devices()[: mesh.data * mesh.tensor])
    shardings = storage_shardings(declarations(decoder), abstract_params(decoder), plan)
    roles = {"policy": declarations(decoder), "ref": declarations(decoder)}
    objective = sft_objective(decoder) if kind == "sft" else paired_objective(decoder, DPO, "live")
    rows = {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in BATCHES[kind].items()}
    params = {"policy": init_params(decoder, 0, shardings)}
    frozen = {} if kind == "sft" else {"ref": init_params(decoder, 1, shardings)}
    loss, metrics, grads = jax.device_get(make_grads(objective, plan, roles)(params, frozen, rows))
    return loss, metrics, flatten(grads["policy"])


@pytest.fixture(scope="module")
def one_device(decoder: Decoder) -> dict[str, tuple[Any, dict, dict]]:
    return {kind: grads_of(decoder, kind, MeshConfig(data=1), 1) for kind in BATCHES}


def assert_close(got: tuple[Any, dict, dict], want: tuple[Any, dict, dict], gradients: float) -> None:
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for path, grad in want[2].items():
        assert np.linalg.norm(got[2][path] - grad) <= gradients * np.linalg.norm(grad), path


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_microbatches_equal_one_batch(decoder: Decoder, one_device: dict, kind: str, microbatches: int):
    got = grads_of(decoder, kind, MeshConfig(data=1), microbatches)
    assert_close(got, one_device[kind], gradients=2e-6)


# Each mesh meets 1, 2 and 4 microbatches, each with another stage.
CASES = [
    (kind, data, tensor, zero, (1, 2, 4)[(i + zero) % 3])
    for i, (data, tensor) in enumerate([(8, 1), (4, 2), (2, 4)])
    for zero in (1, 2, 3)
    for kind in ("sft", "dpo")
    if kind == "sft" or zero == i + 1
]


@pytest.mark.parametrize(("kind", "data", "tensor", "zero", "microbatches"), CASES)
def test_meshes_and_stages_equal_one_device(
    decoder: Decoder, one_device: dict, kind: str, data: int, tensor: int, zero: int, microbatches: int
):
    got = grads_of(decoder, kind, MeshConfig(data, tensor, zero), microbatches)
    assert_close(got, one_device[kind], gradients=1e-5)
