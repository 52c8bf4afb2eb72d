"""Real files, where `LLM_JAX_DATA` names their folder: what the formats meet outside."""

import os
import pathlib

import pytest

from llm_jax.data.bpe_text import pretrain_texts
from llm_jax.data.checking import check_records
from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizer_training import train_bpe

FOLDER = os.environ.get("LLM_JAX_DATA")
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(FOLDER is None, reason="LLM_JAX_DATA names no folder of real data"),
]
ROOT = pathlib.Path(FOLDER or ".")


@pytest.fixture(scope="module")
def tokenizer():
    data = DataConfig(path=str(ROOT / "wikitext-2/valid.txt"), eval_path=str(ROOT / "wikitext-2/test.txt"))
    return train_bpe(pretrain_texts(data), 2048)


def test_wikitext(tokenizer, tmp_path):
    data = DataConfig(path=str(ROOT / "wikitext-2/valid.txt"), eval_path=str(ROOT / "wikitext-2/test.txt"))
    prepared = prepare("pretrain", data, tokenizer, tmp_path)
    for split, file in (("train", "valid"), ("eval", "test")):
        counts = prepared.summary[split]
        # All bytes of a file are targets, save those of each piece's first token.
        size = (ROOT / f"wikitext-2/{file}.txt").stat().st_size
        assert 0.985 * size < counts["target_bytes"] <= size
        assert counts["padding_share"] < 0.02


def test_one_text_file_is_split(tokenizer, tmp_path):
    data = DataConfig(path=str(ROOT / "tinyshakespeare"), eval_fraction=0.1)
    prepared = prepare("pretrain", data, tokenizer, tmp_path)
    assert prepared.summary["eval"]["documents"] > 1


def test_seed_tasks(tokenizer, tmp_path):
    data = DataConfig(path=str(ROOT / "seed_tasks.jsonl"), window=512, on_long="drop", eval_fraction=0.1)
    counts = prepare("sft", data, tokenizer, tmp_path).summary
    assert counts["train"]["documents"] + counts["eval"]["documents"] == 175


def test_hh_rlhf(tokenizer, tmp_path):
    data = DataConfig(path=str(ROOT / "hh-rlhf"), window=1024, on_long="drop")
    check_records("preference", data)
    counts = prepare("preference", data, tokenizer, tmp_path).summary
    assert counts["train"]["documents"] + counts["eval"]["documents"] == 2000
    assert counts["train"]["dropped"] < 400


def test_hh_rlhf_taken_apart(tokenizer, tmp_path):
    """Every answer on its own, beside one to another prompt; four of the chosen ones say nothing."""
    data = DataConfig(path=str(ROOT / "hh-rlhf"), window=1024, on_long="drop", unpair=True)
    prepared = prepare("unpaired_mismatched", data, tokenizer, tmp_path)
    sides = [prepared.summary[side] for side in ("train", "eval")]
    assert sum(side["documents"] for side in sides) == 4000 and sum(side["blank"] for side in sides) == 4
    numbers = prepared.train.columns("answer_index")["answer_index"]
    kept = sides[0]["documents"] - sides[0]["blank"] - sides[0]["dropped"]
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(kept))
