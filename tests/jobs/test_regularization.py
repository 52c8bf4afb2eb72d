"""z-loss, NEFTune and dropout: their formulas, the same numbers on any mesh, and no trace of them when off."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.regularization import Regularization, check_regularization, regularization
from llm_jax.jobs.scoring import next_tokens, target_counts
from llm_jax.jobs.terms import sft_objective, token_count
from llm_jax.models import Decoder, ModelConfig, bind, declarations, init_params, token_scores
from llm_jax.models.cache import Meta, init_caches
from llm_jax.models.noise import Dropout, example_keys, layer_keys, neftune_noise
from llm_jax.objectives import sft
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import Objective, OptimizerConfig, TrainConfig, init_state, make_optimizer, make_train_step
from tests.jobs.batches import Document, Pair, document_rows, pair_rows

VOCAB, ROWS, WINDOW = 64, 16, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
}
DPO = preference_loss(PreferenceConfig(beta=0.3))
DECODER = Decoder(ModelConfig(**SIZES, init_std=0.2, embed_init_std=1.0))
DECLS = {"policy": declarations(DECODER), "ref": declarations(DECODER)}
ALL = Regularization(z_loss=0.01, neftune_noise_alpha=5.0, residual_dropout=0.2, attention_dropout=0.3)


def rows(kind: str, microbatches: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    if kind == "sft":
        lengths = [random.multinomial(WINDOW - row % 5, [0.5, 0.3, 0.2]) for row in range(ROWS)]
        documents = [[Document(random.integers(VOCAB, size=n), np.ones(n, bool)) for n in e if n] for e in lengths]
        found = document_rows(documents, WINDOW)
    else:
        pairs = [Pair(*(list(random.integers(VOCAB, size=n)) for n in (1, 3, 4))) for _ in range(ROWS)]
        found = pair_rows([[pair] for pair in pairs], WINDOW, most_pairs=1)
    return {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in found.items()}


def objective_of(kind: str, extra: Regularization) -> Objective:
    return sft_objective(DECODER, extra) if kind == "sft" else paired_objective(DECODER, DPO, "live", extra)


def parts(kind: str, extra: Regularization, mesh: MeshConfig):
    plan = make_plan(mesh, devices=jax.devices()[: mesh.data * mesh.tensor])
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), {"policy": DECLS["policy"]}, 10)
    frozen = {"ref": init_params(DECODER, 1)} if kind == "dpo" else {}
    state = init_state({"policy": init_params(DECODER, 0)}, optimizer, DECLS, plan, frozen=frozen)
    return make_train_step(objective_of(kind, extra), optimizer, plan, DECLS, seed=3), state


def metrics_of(kind: str, extra: Regularization, mesh: MeshConfig, microbatches: int) -> list[dict[str, float]]:
    step, state = parts(kind, extra, mesh)
    history = []
    for _ in range(2):
        state, metrics = step(state, rows(kind, microbatches))
        history.append({name: float(value) for name, value in metrics.items()})
    return history


@pytest.fixture(scope="module")
def one_device():
    return {kind: metrics_of(kind, ALL, MeshConfig(1), 1) for kind in ("sft", "dpo")}


@pytest.mark.parametrize(
    "kind, mesh, microbatches",
    [("sft", MeshConfig(1), 4), ("sft", MeshConfig(4, 2, 3), 2), ("dpo", MeshConfig(2, 4, 1), 1)],
)
def test_the_same_noise_on_any_mesh_and_for_any_microbatches(one_device, kind, mesh, microbatches):
    for got, want in zip(metrics_of(kind, ALL, mesh, microbatches), one_device[kind]):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("field", ["neftune_noise_alpha", "residual_dropout", "attention_dropout"])
def test_each_changes_the_loss_and_each_step_draws_anew(field):
    extra = Regularization(**{field: getattr(ALL, field)})
    step, state = parts("sft", extra, MeshConfig(1))
    plain, _ = parts("sft", Regularization(), MeshConfig(1))
    copy = jax.tree.map(jnp.copy, state)
    want = float(plain(jax.tree.map(jnp.copy, state), rows("sft", 1))[1]["loss"])
    first = float(step(copy, rows("sft", 1))[1]["loss"])
    second = float(step({**state, "step": state["step"] + 1}, rows("sft", 1))[1]["loss"])
    assert len({want, first, second}) == 3


def test_with_none_set_the_program_is_the_one_without():
    """The objective as it was before there was any of this, written out: the same program, text for text."""

    def terms(params, frozen, rows, statistics, key):
        decoder = bind(DECODER, params["policy"])
        targets, mask = next_tokens(rows)
        hidden, _, _ = decoder(rows["tokens"], rows["positions"], rows["segment_ids"])
        scores = dict(token_scores(decoder, hidden, targets, mask, outputs=("logps", "entropy", "argmax")))
        scores["is_top1"] = mask & (scores.pop("argmax") == targets)
        losses, metrics = sft(scores["logps"], mask, scores["entropy"], scores["is_top1"])
        count = mask.sum().astype(jnp.float32)
        averaged = {name: (values.sum(), count) for name, values in metrics.items()}
        return {"nll": losses.sum()}, averaged | token_count(rows)

    before = Objective(terms, lambda batch: {"nll": target_counts(batch).astype(jnp.float32)}, {"nll": 1.0})
    plan = make_plan(MeshConfig(4, 2, 3))
    optimizer = make_optimizer(OptimizerConfig(), {"policy": DECLS["policy"]}, 10)
    state = init_state({"policy": init_params(DECODER, 0)}, optimizer, DECLS, plan)
    texts = [
        make_train_step(objective, optimizer, plan, DECLS).lower(state, rows("sft", 2)).as_text()
        for objective in (before, sft_objective(DECODER, regularization(TrainConfig(), DECODER.config)))
    ]
    assert texts[0] == texts[1] and "threefry" not in texts[0]


# ---- z-loss


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_z_loss_is_a_term_of_its_own(kind):
    """loss = the job's loss + c mean(lse^2) over target tokens, lse of the full logits."""
    extra, plain = Regularization(z_loss=0.03), Regularization()
    got, want = (metrics_of(kind, each, MeshConfig(1), 2)[0] for each in (extra, plain))
    batch = {name: x[0] for name, x in rows(kind, 1).items()}
    decoder = bind(DECODER, init_params(DECODER, 0))
    logits = decoder.logits(decoder(batch["tokens"], batch["positions"], batch["segment_ids"])[0])
    _, mask = next_tokens(batch)
    z = float(jnp.where(mask, jax.nn.logsumexp(logits, -1) ** 2, 0).sum() / mask.sum())
    name = {"sft": "nll", "dpo": "sigmoid"}[kind]
    np.testing.assert_allclose(got["loss/z_loss"], z, rtol=1e-5)
    np.testing.assert_allclose(got[f"loss/{name}"], want["loss"], rtol=1e-6)
    np.testing.assert_allclose(got["loss"], want["loss"] + 0.03 * z, rtol=1e-6)
    assert got["grad_norm"] != want["grad_norm"]


# ---- NEFTune


def test_neftune_noise_is_scaled_by_each_documents_length():
    segments = jnp.asarray([[1] * 10 + [2] * 4 + [0] * 2, [1] * 16])
    keys = example_keys(jax.random.key(0), 1, jnp.arange(2))
    noise = np.asarray(neftune_noise(keys, segments, 512, 5.0))
    assert not noise[0, 14:].any()
    for part, length in ((noise[0, :10], 10), (noise[0, 10:14], 4), (noise[1], 16)):
        bound = 5.0 / np.sqrt(length * 512)
        assert abs(part).max() <= bound and abs(part).max() > 0.98 * bound
        np.testing.assert_allclose(part.std(), bound / np.sqrt(3), rtol=0.05)
        assert abs(part.mean()) < 0.05 * bound


# ---- dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
    keys = layer_keys(example_keys(jax.random.key(0), 2, jnp.arange(3)), 2)
    x = jnp.ones((3, 32, 64))
    dropped = [np.asarray(Dropout(keys[layer], 0.25)(x, site)) for layer in (0, 1) for site in (0, 1)]
    for y in dropped:
        assert set(np.unique(y)) == {0.0, np.float32(4 / 3)}
        np.testing.assert_allclose((y == 0).mean(axis=(1, 2)), 0.25, atol=0.03)
    for i, y in enumerate(dropped):
        assert all((y != other).mean() > 0.3 for other in dropped[:i]), "layers and sites draw apart"
    assert (dropped[0][0] != dropped[0][1]).mean() > 0.3, "examples draw apart"


def test_there_is_no_attention_dropout_over_a_cache():
    decoder = bind(DECODER, init_params(DECODER, 0))
    keys = layer_keys(example_keys(jax.random.key(0), 3, jnp.arange(1)), 2)
    caches: Any = init_caches(DECODER.config, 1, 8)
    meta = Meta(jnp.zeros((1, 1), jnp.int32), None, jnp.zeros(1, jnp.int32))
    inputs = {"attention_dropout": Dropout(keys, 0.1)}
    with pytest.raises(UserError, match="attention_dropout"):
        decoder(jnp.zeros((1, 1), jnp.int32), caches=caches, meta=meta, layer_inputs=inputs)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"residual_dropout": 1.0}, "train.residual_dropout is 1.0"),
        ({"attention_dropout": -0.1}, "train.attention_dropout is -0.1"),
        ({"z_loss": -1.0}, "train.z_loss is -1.0"),
        ({"neftune_noise_alpha": 0.0}, "train.neftune_noise_alpha is 0.0"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0"),
    ],
)
def test_fields_out_of_range(fields, words):
    with pytest.raises(UserError, match=words):
        check_regularization(replace(TrainConfig(), **fields))
