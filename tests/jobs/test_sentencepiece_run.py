"""A whole run whose vocabulary SentencePiece trained: what it leaves is read by transformers with the same ids."""

import json

import pytest

from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs.graph import run
from tests.jobs.conftest import CONFIGS


@pytest.mark.parametrize("kind", ["sentencepiece_unigram"])
def test_pretrain_and_export(tmp_path, monkeypatch, kind):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    node = run(f"{CONFIGS / 'pretrain.py'}:test", [("tokenizer.kind", kind)])
    metrics = [json.loads(line) for line in node.workdir.metrics.read_text().splitlines()]
    assert any("eval_loss" in line for line in metrics)
    ours = load_tokenizer(node.workdir.export)
    theirs = transformers.AutoTokenizer.from_pretrained(node.workdir.export)
    assert '"Unigram"' in ours.backend.to_str()
    for text in ("Ben has 23 pencils. 23 - 2 = 21\n\n", "naïve 日本語 <|im_end|> 👩‍👩‍👧", "  x  "):
        assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=True)
        assert ours.decode(ours.encode(text)) == text
