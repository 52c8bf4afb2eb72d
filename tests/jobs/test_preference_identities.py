"""What has to be equal: policy and reference at the start, microbatches, devices, packed and padded rows."""

from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.base.config import bind
from llm_jax.base.trees import flatten
from llm_jax.data.encode import Sequence
from llm_jax.data.fitting import Item
from llm_jax.data.mismatching import mismatched
from llm_jax.data.rows import fill_unpaired_row, unpaired_schema
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.unpaired import unpaired_objective
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.init import init_params
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.plan import make_plan, storage_shardings
from llm_jax.training.step import make_grads
from tests.jobs.batches import Pair, evaluate, pair_rows

VOCAB, WINDOW = 64, 40
# Every loss that takes something of the whole batch, at once: ranks, shifts, and likelihoods per token.
OF_BATCH = ("aot", "aot_unpaired", "bco", "orpo", "sft")


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


def objective_of(decoder: Decoder, *names: str, reference: Any = "live", **options: Any) -> Any:
    config = bind(PreferenceConfig, {"loss_type": names, "reference_logps": reference, "beta": 0.3, **options})
    loss = preference_loss(config)
    return (unpaired_objective if loss.unpaired else paired_objective)(decoder, loss, reference)


def pairs_of(seed: int, count: int) -> list[Pair]:
    random = np.random.default_rng(seed)
    sizes = [(2, 3, 5), (1, 7, 4), (3, 2, 9)]
    return [Pair(*(list(random.integers(VOCAB, size=n)) for n in sizes[i % 3])) for i in range(count)]


def paired_rows() -> dict[str, Any]:
    """Sixteen rows of none to two pairs, with weights of their own."""
    pairs = iter(pairs_of(0, 32))
    rows = [[next(pairs) for _ in range(row % 3)] for row in range(16)]
    made = pair_rows(rows, WINDOW, most_pairs=2)
    weights = np.random.default_rng(1).random(made["pair_index"].shape, np.float32)
    return made | {"weight": np.where(made["pair_index"] >= 0, weights, 0).astype(np.float32)}


def unpaired_rows(layout: list[int], window: int, seed: int = 2) -> dict[str, Any]:
    """Rows of so many answers each, in order, with the mismatched ones beside them."""
    random = np.random.default_rng(seed)
    items = []
    for number in range(sum(layout)):
        ids = random.integers(VOCAB, size=8 + number % 5)
        mask = np.arange(len(ids)) >= 2 + number % 3
        columns = {"label": float(number % 3 > 0), "weight": 0.5 + number % 2}
        items.append(Item((Sequence(ids.astype(np.int32), mask.astype(np.uint8)),), columns))
    answers = iter([(n, item.sequences, item.columns) for n, item in enumerate(mismatched(items, window))])
    schema = unpaired_schema(window, max(layout), True)
    token_bytes = np.ones(VOCAB, np.int32)
    rows = [fill_unpaired_row(schema, [next(answers) for _ in range(n)], token_bytes, 0, 0) for n in layout]
    return {name: np.stack([row[name] for row in rows]) for name in schema}


ROWS = {"paired": paired_rows(), "unpaired": unpaired_rows([row % 3 for row in range(16)], WINDOW)}


def grads_of(decoder: Decoder, kind: str, devices: int, microbatches: int) -> tuple[Any, dict, dict]:
    plan = make_plan(MeshConfig(data=devices, zero=2 if devices > 1 else 0), devices=jax.devices()[:devices])
    shardings = storage_shardings(declarations(decoder), abstract_params(decoder), plan)
    roles = {"policy": declarations(decoder), "ref": declarations(decoder)}
    objective = objective_of(decoder, *(OF_BATCH if kind == "paired" else ("kto", "bco_unpaired")))
    rows = {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in ROWS[kind].items()}
    # These seeds have a positive z.
    params, frozen = {"policy": init_params(decoder, 1, shardings)}, {"ref": init_params(decoder, 0, shardings)}
    loss, metrics, grads = jax.device_get(make_grads(objective, plan, roles)(params, frozen, rows))
    return loss, metrics, flatten(grads["policy"])


def assert_close(got: tuple[Any, dict, dict], want: tuple[Any, dict, dict]) -> None:
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=2e-6, err_msg=name)
    for path, grad in want[2].items():
        assert np.linalg.norm(got[2][path] - grad) <= 1e-5 * np.linalg.norm(grad), path


@pytest.mark.parametrize("kind", ROWS)
def test_microbatches_and_devices_equal_one_batch(decoder: Decoder, kind: str):
    whole = grads_of(decoder, kind, 1, 1)
    assert kind == "paired" or whole[1]["kl"] > 0.01  # or z would be 0 in each
    for devices, microbatches in ((1, 4), (8, 2)):
        assert_close(grads_of(decoder, kind, devices, microbatches), whole)


def evaluated(decoder: Decoder, objective: Any, rows: dict[str, Any]) -> tuple[Any, dict, dict]:
    plan = make_plan(MeshConfig(data=1), devices=jax.devices()[:1])
    roles = {"policy": declarations(decoder), "ref": declarations(decoder)}
    params, frozen = {"policy": init_params(decoder, 1)}, {"ref": init_params(decoder, 0)}
    batch = {name: x[None] for name, x in rows.items()}
    loss, metrics, grads = jax.device_get(make_grads(objective, plan, roles)(params, frozen, batch))
    return loss, metrics, flatten(grads["policy"])


def test_packed_answers_equal_padded_ones(decoder: Decoder):
    objective = objective_of(decoder, "kto", "apo_zero_unpaired")
    alone = evaluated(decoder, objective, unpaired_rows([1] * 5, 16))
    packed = evaluated(decoder, objective, unpaired_rows([3, 2], 64))
    assert_close(packed, alone)


def test_padding_on_either_side_is_the_same(decoder: Decoder):
    rows = pair_rows([[pair] for pair in pairs_of(3, 3)], WINDOW, most_pairs=1)
    left = dict(rows)
    for name in ("tokens", "segment_ids", "positions", "loss_mask", "pair_id", "side"):
        used = (rows["segment_ids"] > 0).sum(1)
        left[name] = np.stack([np.roll(row, WINDOW - n) for row, n in zip(rows[name], used)])
    objective = objective_of(decoder, "sigmoid", "orpo", ld_alpha=0.5, use_weighting=True)
    ref = {"ref": init_params(decoder, 1)}
    results = [evaluate(objective, init_params(decoder, 0), ref, batch) for batch in (rows, left)]
    assert_close(results[1], results[0])


def test_policy_equal_to_reference(decoder: Decoder):
    """ln 2 and no margin for DPO (Rafailov et al. 2023, eq. 7 at 0); ½ and z = 0 for KTO; no KL."""
    same = init_params(decoder, 0)
    rows = ROWS["paired"] | {"weight": np.ones((16, 2), np.float32)}
    loss, metrics, _ = evaluate(objective_of(decoder, "sigmoid"), same, {"ref": same}, rows)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    zero = {"atol": 1e-6, "rtol": 0}
    np.testing.assert_allclose([metrics["rewards/margins"], metrics["implicit_kl"]], 0, **zero)
    plan = make_plan(MeshConfig(data=1), devices=jax.devices()[:1])
    roles = {"policy": declarations(decoder), "ref": declarations(decoder)}
    batch = {name: x[None] for name, x in ROWS["unpaired"].items()} | {"weight": np.ones((1, 16, 2), np.float32)}
    grads = make_grads(objective_of(decoder, "kto"), plan, roles)
    loss, metrics, _ = grads({"policy": same}, {"ref": same}, batch)
    np.testing.assert_allclose(loss, 0.5, rtol=1e-6)
    np.testing.assert_allclose([metrics[n] for n in ("kl", "implicit_kl", "rewards/margins")], 0, **zero)


def test_a_pairs_weight_multiplies_its_loss(decoder: Decoder):
    """A pair of weight 2 beside one of weight 0: the mean is over both pairs."""
    a, b = pairs_of(4, 2)
    objective, ref = objective_of(decoder, "sigmoid"), {"ref": init_params(decoder, 1)}
    rows = pair_rows([[a, b]], WINDOW, most_pairs=2) | {"weight": np.array([[2.0, 0.0]], np.float32)}
    alone = pair_rows([[a]], WINDOW, most_pairs=2) | {"weight": np.ones((1, 2), np.float32)}
    losses = [evaluate(objective, init_params(decoder, 0), ref, batch)[0] for batch in (rows, alone)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
