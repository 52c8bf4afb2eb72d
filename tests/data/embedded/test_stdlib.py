"""The standard library's text and docstrings."""

import random

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded import docstrings, stdlib_text


def test_modules():
    found = stdlib_text.modules()
    names = [document.name for document in found]
    assert names == sorted(names, key=lambda n: n.split("/"))
    assert sum(len(document.text) for document in found) > 5_000_000
    assert {"email/parser.py", "argparse.py"} <= set(names)
    skipped = ("test/", "encodings/", "site-packages/", "_sysconfigdata")
    assert not [name for name in names if name.startswith(skipped) or "/tests/" in name or "/test/" in name]


def test_split():
    train, held_out = stdlib_text.documents("train"), stdlib_text.documents("eval")
    assert sorted(train + held_out) == sorted(stdlib_text.modules())
    assert 0.02 < len(held_out) / len(train) < 0.2
    assert all(stdlib_text.split_of(document.name) == "eval" for document in held_out)


def test_python_without_sources(tmp_path, monkeypatch):
    stdlib_text.modules.cache_clear()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no standard library sources"):
        stdlib_text.modules()
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "b.py").write_bytes(b"\xff")
    (tmp_path / "c.py").write_text(" \n")
    assert [document.name for document in stdlib_text.modules()] == ["a.py"]
    stdlib_text.modules.cache_clear()


def test_docstrings_are_distinct_capped_and_not_shared():
    train, held_out = docstrings.entries("train"), docstrings.entries("eval")
    texts = [entry.docstring for entry in (*train, *held_out)]
    assert len(set(texts)) == len(texts) and len(train) > 2000 and len(held_out) > 100
    for split, entries in (("train", train), ("eval", held_out)):
        modules = [entry.module for entry in entries]
        assert max(map(modules.count, set(modules))) <= docstrings.CAP_PER_MODULE[split]
        assert {stdlib_text.split_of(module) for module in modules} == {split}


def test_rejected_docstrings_are_never_the_right_one():
    config = EmbeddedConfig(records=2000)
    kinds = {"cut": 0, "shuffled": 0, "other": 0}
    for record in docstrings.preferences(config, "train"):
        chosen, rejected = (record[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen != rejected
        same_words = sorted(chosen.split()) == sorted(rejected.split())
        kind = "cut" if chosen.startswith(rejected) else "shuffled" if same_words else "other"
        assert record["kind"] == kind
        kinds[kind] += 1
    assert kinds["other"] == pytest.approx(2000 * 4 / 6, rel=0.1)
    assert kinds["cut"] == pytest.approx(2000 / 6, rel=0.2)


def test_words_that_cannot_be_shuffled():
    entries = tuple(docstrings.Entry("m.py", f"def f{i}():", text) for i, text in enumerate(("no no no no", "a b c d")))
    for seed in range(50):
        assert docstrings.corrupt(entries[0], entries, random.Random(seed))[1] != "no no no no"
