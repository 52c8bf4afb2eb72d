"""A record's own `label_smoothing`: what the loss makes of it, and which losses refuse it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import objectives
from llm_jax.base.errors import UserError
from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs import graph
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import arguments
from llm_jax.jobs.preference_loss import preference_loss
from tests.jobs.conftest import CONFIGS


def test_each_pair_has_its_own():
    """-(1 - ε) log σ(βd) - ε log σ(-βd) and its gradient in d, β((1 - ε)(σ(βd) - 1) + ε σ(βd)), with an ε of each."""
    rng = np.random.default_rng(0)
    d, smoothing = rng.normal(0, 30, 64), rng.uniform(0, 0.5, 64)
    smoothing[:4] = (0.0, 0.5, 0.0, 0.5)
    d[2:4] = (1e4, -1e4)
    beta, zero = 0.3, jnp.zeros(64)

    def loss(chosen):
        return objectives.dpo(chosen, zero, zero, zero, beta, jnp.asarray(smoothing, jnp.float32))[0]

    chosen = jnp.asarray(d, jnp.float32)
    d = np.asarray(chosen, np.float64)
    expected = (1 - smoothing) * np.logaddexp(0, -beta * d) + smoothing * np.logaddexp(0, beta * d)
    np.testing.assert_allclose(loss(chosen), expected, rtol=2e-6)
    sigma = 1 / (1 + np.exp(-np.clip(beta * d, -700, 700)))
    gradient = beta * ((1 - smoothing) * (sigma - 1) + smoothing * sigma)
    found = jax.grad(lambda chosen: loss(chosen).sum())(chosen)
    assert np.linalg.norm(found - gradient) / np.linalg.norm(gradient) < 1e-6


def test_the_same_for_all_is_conservative_dpo():
    chosen, rejected = jnp.array([-12, -30, -7.5]), jnp.array([-14, -25, -9.0])
    ref_chosen, ref_rejected = jnp.array([-13, -29, -8.0]), jnp.array([-13.5, -26, -8.5])

    def losses(epsilon):
        return objectives.dpo(chosen, rejected, ref_chosen, ref_rejected, 0.1, epsilon)[0]

    one, each = losses(0.1), losses(jnp.full(3, 0.1))
    np.testing.assert_allclose(one, each, rtol=1e-7)
    np.testing.assert_allclose(one.mean(), 0.689498, atol=5e-7)  # the reference's cDPO(.1)
    assert np.asarray(losses(0.0)).tobytes() == np.asarray(losses(jnp.zeros(3))).tobytes()


def test_records_without_one_have_the_configurations():
    (term,) = preference_loss(PreferenceConfig(label_smoothing=0.2)).terms
    rows = {"label_smoothing": jnp.array([[0.3, jnp.nan, 0.0]])}
    np.testing.assert_allclose(arguments(term, {}, rows)["label_smoothing"], [[0.3, 0.2, 0.0]])
    (term,) = preference_loss(PreferenceConfig(loss_type="hinge")).terms
    assert "label_smoothing" not in arguments(term, {}, rows)


def write(tmp_path, **columns):
    steps = [{"prompt": f"{i}?", "prefix": "a", "chosen": f" {i}", "rejected": " b", **columns} for i in range(8)]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return str(file)


def test_rows_hold_them(chain, tmp_path):
    data = DataConfig(path=write(tmp_path, label_smoothing=0.25), eval_fraction=0.2, window=64)
    tokenizer = load_tokenizer(chain["sft"].workdir.tokenizer)
    columns = prepare("preference", data, tokenizer, tmp_path / "rows").train.columns("pair_index", "label_smoothing")
    there = columns["pair_index"] >= 0
    assert there.any() and (columns["label_smoothing"][there] == 0.25).all()


def test_a_weight_is_refused_where_a_loss_has_no_single_pairs(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [("init_from", str(chain["sft"].workdir.path)), ("mesh.data", "1"), ("data.eval_fraction", "0.2")]
    given += [("loss_type", "sigmoid,aot"), ("data.path", write(tmp_path, weight=0.5))]
    with pytest.raises(UserError, match="`weight`, but loss_type=aot has no loss of a single pair"):
        graph.prepare(f"{CONFIGS / 'dpo.py'}:test", given)


def test_a_loss_that_does_not_read_them_refuses_them(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [("init_from", str(chain["sft"].workdir.path)), ("mesh.data", "1"), ("loss_type", "ipo")]
    given += [("data.path", write(tmp_path, label_smoothing=0.25)), ("data.eval_fraction", "0.2")]
    with pytest.raises(UserError, match=r"`label_smoothing`, which loss_type=ipo does not read \(sigmoid does\)"):
        graph.prepare(f"{CONFIGS / 'dpo.py'}:test", given)
