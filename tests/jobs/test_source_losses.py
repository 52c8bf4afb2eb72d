"""Per-source losses are those of the source's rows alone, whatever the batch they come in."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.jobs.graph import run
from llm_jax.jobs.terms import source_metrics, source_values
from llm_jax.training.metrics import Accumulator, read_metrics
from tests.jobs.conftest import CONFIGS

SOURCES = ("wiki", "books", "code")


def test_a_loss_of_each_source():
    rng = np.random.default_rng(0)
    losses, where = rng.random((6, 5)).astype(np.float32), rng.random((6, 5)) < 0.6
    ids = np.array([0, 1, 0, 1, 1, 0], np.int32)
    found = source_values({"source_id": jnp.asarray(ids)}, jnp.asarray(losses), jnp.asarray(where), SOURCES)
    assert tuple(found) == source_metrics(SOURCES) == ("loss_wiki", "loss_books", "loss_code")
    for number, (total, weight) in enumerate(found.values()):
        own = where & (ids == number)[:, None]
        assert float(weight) == own.sum() and float(total) == pytest.approx(losses[own].sum(), rel=1e-6)
    assert source_values({}, jnp.asarray(losses), jnp.asarray(where), ["records"]) == {}


def test_a_ratio_of_sums_over_the_interval():
    interval, broken = Accumulator(), Accumulator()
    steps = [
        {"loss_a": np.array([6.0, 2.0]), "loss_b": np.zeros(2)},
        {"loss_a": np.array([1.0, 5.0]), "loss_b": np.zeros(2)},
    ]
    for step in steps:
        interval.add(step)
        broken.add(step)
        broken = Accumulator(json.loads(json.dumps(broken.saved())))
    # Not the mean of 3 and 0.2; and of b there was nothing.
    assert interval.take() == broken.take() == {"loss_a": 1.0}
    assert interval.take() == {}


def test_a_mixture_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("wiki", 40), ("books", 200)):
        lines = [json.dumps({"text": f"{name} {i} " + "the quick brown fox " * (i % 7)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    mixture = [{"path": "wiki.jsonl", "weight": 3}, {"path": "books.jsonl", "weight": 1, "name": "long_books"}]
    overrides = [
        ("data.mixture", json.dumps(mixture)),
        ("data.window", "32"),
        ("data.eval_fraction", "0.2"),
        ("train.steps", "8"),
        ("train.log_every", "2"),
        ("train.microbatches", "2"),
        ("mesh.data", "1"),
    ]
    node = run(f"{CONFIGS / 'pretrain.py'}:test", overrides)
    lines = read_metrics(node.workdir.metrics)
    training = [line for line in lines if "loss" in line]
    assert len(training) == 4
    for line in training:  # two steps of eight rows: twelve are of wiki
        parts = sorted([line["loss_wiki"], line["loss_long_books"]])
        assert parts[0] < line["loss"] < parts[1]
    (last,) = [line for line in lines if "eval_loss" in line and line["step"] == 8]
    assert {"eval_wiki_loss", "eval_long_books_loss"} <= last.keys()
    summary = json.loads((node.workdir.data / "summary.json").read_text())
    rows = {name: source["rows"] for name, source in summary["train"]["sources"].items()}
    assert summary["epochs"] == {
        "wiki": round(48 / rows["wiki"], 3),
        "long_books": round(16 / rows["long_books"], 3),
    }
    # Two packed sources and the tokenizer.
    assert len(list((tmp_path / "runs" / "data").iterdir())) == 3
    jax.clear_caches()
