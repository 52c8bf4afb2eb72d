"""A packed window is the same documents one per row: outputs, losses, metrics and gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.scoring import answer_logps, next_tokens, score_rows
from llm_jax.jobs.terms import sft_objective
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.init import init_params
from llm_jax.models.parameter import bind
from llm_jax.objectives import dpo
from tests.jobs.batches import Document, Pair, document_rows, evaluate, pair_rows

VOCAB = 61
BETA = 0.3
DPO = preference_loss(PreferenceConfig(beta=BETA))
CDPO = preference_loss(PreferenceConfig(beta=BETA, label_smoothing=0.1))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(
        ModelConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            init_std=0.2,
            embed_init_std=1.0,
            attention_bias=True,
        )
    )


@pytest.fixture(scope="module")
def params(decoder: Decoder) -> dict[str, Any]:
    return init_params(decoder, 0)


def assert_same(one: tuple[Any, dict, dict], other: tuple[Any, dict, dict]) -> None:
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    # A reward is β times a difference of sums of log-probabilities near 100, each rounded twice.
    rounding = 2 * BETA * float(np.spacing(np.float32(100)))
    for name, value in one[1].items():
        atol = rounding if name.startswith("rewards/") else rounding / BETA if name == "implicit_kl" else 0
        np.testing.assert_allclose(value, other[1][name], rtol=1e-5, atol=atol, err_msg=name)
    for path, grad in one[2].items():
        difference = np.linalg.norm(np.asarray(grad - other[2][path]))
        assert difference <= 1e-5 * np.linalg.norm(np.asarray(other[2][path])), path


def random_documents(seed: int, lengths: list[int]) -> list[Document]:
    random = np.random.default_rng(seed)
    return [Document(random.integers(VOCAB, size=n), random.integers(2, size=n)) for n in lengths]


def test_next_tokens_by_hand():
    rows = {
        "tokens": jnp.array([[5, 6, 7, 8, 9, 0]]),
        "segment_ids": jnp.array([[1, 1, 1, 2, 2, 0]]),
        "loss_mask": jnp.array([[1, 0, 1, 1, 1, 1]], jnp.uint8),
    }
    targets, mask = next_tokens(rows)
    np.testing.assert_array_equal(targets, [[6, 7, 8, 9, 0, 0]])
    # 6 is not marked; 8 is marked but opens its document; padding is no target whatever its mark.
    np.testing.assert_array_equal(mask, [[False, True, False, True, False, False]])
    targets, mask = next_tokens(rows, 2)
    np.testing.assert_array_equal(targets, [[7, 8, 9, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[True, False, False, False, False, False]])


def test_packed_documents_equal_one_per_row(decoder: Decoder, params: dict):
    a, b, c, d, e = random_documents(1, [37, 21, 64, 5, 50])
    objective = sft_objective(decoder)
    alone = evaluate(objective, params, {}, document_rows([[a], [b], [c], [d], [e]], 64))
    packed = evaluate(objective, params, {}, document_rows([[c, d, b], [e, a]], 96))
    assert_same(packed, alone)
    assert packed[1]["num_tokens"] == 37 + 21 + 64 + 5 + 50


def test_changing_a_document_changes_nothing_of_the_others(decoder: Decoder, params: dict):
    documents = random_documents(2, [30, 45, 41, 70])
    others = random_documents(3, [45])

    @jax.jit
    def outputs(params: Mapping, rows: Mapping) -> tuple:
        bound = bind(decoder, params)
        scores, mask = score_rows(bound, rows, ("logps", "entropy", "mean_logit"))
        hidden = bound(rows["tokens"], rows["positions"], rows["segment_ids"])[0]
        return hidden, {name: jnp.where(mask, values, 0) for name, values in scores.items()}

    rows = document_rows([documents], 192)
    changed = document_rows([[documents[0], *others, *documents[2:]]], 192)
    before, after = outputs(params, rows), outputs(params, changed)
    same = (rows["segment_ids"] != 2)[0]
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[0, same], np.asarray(y)[0, same])
    assert (np.asarray(before[0]) != np.asarray(after[0]))[0, ~same].any()


def random_pairs(seed: int, lengths: list[tuple[int, int, int]]) -> list[Pair]:
    random = np.random.default_rng(seed)
    return [Pair(*(list(random.integers(VOCAB, size=n)) for n in each)) for each in lengths]


def padded_pairs(decoder: Decoder, pairs: list[Pair], ref: Mapping) -> Callable:
    """DPO written out over one answer per row and whole logits: no packing, no masks from segments, no fused head."""
    answers = [(pair.prompt, getattr(pair, side)) for side in ("chosen", "rejected") for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in answers)
    tokens: Any = np.zeros((len(answers), width), np.int32)
    counted = np.zeros((len(answers), width - 1), bool)
    for i, (prompt, answer) in enumerate(answers):
        tokens[i, : len(prompt) + len(answer)] = [*prompt, *answer]
        counted[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True

    def scores(params: Mapping) -> tuple:
        bound = bind(decoder, params)
        logits = bound.logits(bound(tokens)[0])[:, :-1]
        log_probs = jax.nn.log_softmax(logits)
        logps = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        return logits, log_probs, jnp.where(counted, logps, 0).sum(axis=1)

    def loss(params: Mapping) -> tuple:
        logits, log_probs, sums = scores(params)
        n = len(pairs)
        losses, metrics = dpo(sums[:n], sums[n:], *jnp.split(scores(ref)[2], 2), beta=BETA)
        mean_logits, right = logits.mean(axis=-1), logits.argmax(axis=-1) == tokens[:, 1:]
        entropy = -(jnp.exp(log_probs) * log_probs).sum(axis=-1)
        lengths = counted.sum(axis=1)
        ratios, probs = sums - scores(ref)[2], jnp.exp(sums / lengths)
        watched = {"lengths/chosen": lengths[:n], "lengths/rejected": lengths[n:], "implicit_kl": ratios}
        metrics |= watched | {"probs/chosen": probs[:n], "probs/rejected": probs[n:]}
        metrics = {name: values.mean() for name, values in metrics.items()} | {
            "entropy": entropy[counted].mean(),
            "mean_token_accuracy": right[:n][counted[:n]].mean(),
            "logits/chosen": mean_logits[:n][counted[:n]].mean(),
            "logits/rejected": mean_logits[n:][counted[n:]].mean(),
        }
        return losses.mean(), metrics

    return loss


@pytest.mark.parametrize("reference", ["stored", "live"])
def test_packed_pairs_equal_padded_pairs(decoder: Decoder, params: dict, reference: Any):
    a, b, c, d = random_pairs(4, [(7, 12, 9), (1, 3, 20), (15, 8, 1), (4, 30, 31)])
    ref = init_params(decoder, 1)
    rows = pair_rows([[a, b, c], [d]], 128, most_pairs=4)
    objective, frozen = paired_objective(decoder, DPO, reference), {"ref": ref}
    if reference == "stored":
        stored = jax.jit(lambda p: answer_logps(bind(decoder, p), rows))(ref)
        # What a loader joins for absent pairs must not matter.
        absent = rows["pair_index"] < 0
        rows |= {f"ref_{name}": np.where(absent, np.nan, values) for name, values in stored.items()}
        frozen = {}
    packed = evaluate(objective, params, frozen, rows)
    (value, metrics), grads = jax.jit(jax.value_and_grad(padded_pairs(decoder, [a, b, c, d], ref), has_aux=True))(
        params
    )
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in (a, b, c, d))
    assert_same(packed, (value, metrics | {"num_tokens": tokens}, flatten(grads)))


def test_pairs_in_any_order_and_window_give_the_same(decoder: Decoder, params: dict):
    a, b, c = random_pairs(5, [(7, 12, 9), (2, 3, 20), (15, 8, 1)])
    ref = {"ref": init_params(decoder, 1)}
    objective = paired_objective(decoder, CDPO, "live")
    alone = evaluate(objective, params, ref, pair_rows([[a], [b], [c]], 64, most_pairs=1))
    packed = evaluate(objective, params, ref, pair_rows([[c, b, a]], 128, most_pairs=5))
    assert_same(packed, alone)
