"""Real files, where `LLM_JAX_DATA` names their folder: what the formats meet outside.

    LLM_JAX_DATA=FOLDER python -m pytest tests/data/test_real_data.py -k gsm8k

counts GSM8K's steps, marks and pairs: 8,473 people's and 4,000 models' solutions, none lost, none split in two.
"""

import gzip
import json
import os
import pathlib

import pytest

from llm_jax.data.bpe_text import pretrain_texts
from llm_jax.data.checking import check_records
from llm_jax.data.config import DataConfig
from llm_jax.data.formats import read_examples
from llm_jax.data.prepare import prepare
from llm_jax.data.steps import is_true, marked_equations, split_steps
from llm_jax.data.stepwise import marked_solutions
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


def gsm8k(name):
    """A file of GSM8K's, line by line."""
    with gzip.open(ROOT / f"gsm8k/{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def test_gsm8k_steps():
    """Every solution is its steps, none lost or split in two: as many as lines, each mark whole, the result alone."""
    people = [row["answer"] for name in ("train", "test") for row in gsm8k(name)]
    models = [field["solution"] for row in gsm8k("model_solutions") for field in marked_solutions(row).values()]
    for texts, solutions, steps, marks, unclosed, unread, false in (
        (people, 8473, 38808, 26928, 0, 0, 0),
        (models, 4000, 17479, 12559, 4, 34, 119),
    ):
        found = [split_steps(text) for text in texts]
        assert ["".join(one) for one in found] == texts and len(texts) == solutions
        lines = [[line for line in text.split("\n") if line.strip()] for text in texts]
        assert all(len(a) == len(b) for a, b in zip(found, lines, strict=True) if len(b) > 1)
        assert sum(map(len, found)) == steps
        equations = [equation for one in found for step in one for equation in marked_equations(step)]
        assert len(equations) == sum(text.count("<<") for text in texts) - unclosed == marks
        truths = [is_true(*equation) for equation in equations]
        assert (truths.count(None), truths.count(False)) == (unread, false)
    assert all(split_steps(text)[-1].startswith("####") for text in people)


def test_gsm8k_pairs(tokenizer, tmp_path):
    """The models' right over their wrong solutions, at the first step in which they differ, as rows."""
    pairs = [read_examples("preference", row, f"{i}") for i, row in enumerate(gsm8k("model_solutions"))]
    wrong = sum(any(not s["is_correct"] for s in marked_solutions(r).values()) for r in gsm8k("model_solutions"))
    assert sum(map(bool, pairs)) == wrong == 876 and sum(map(len, pairs)) == 3053
    data = DataConfig(path=str(ROOT / "gsm8k/model_solutions.jsonl.gz"), window=2048)
    check_records("preference", data)
    counts = prepare("preference", data, tokenizer, tmp_path).summary
    made = [counts[split]["documents"] for split in ("train", "eval")]
    assert sum(made) == sum(map(len, pairs))
    for split in ("train", "eval"):
        assert [counts[split][name] for name in ("dropped", "truncated", "identical", "blank")] == [0, 0, 0, 0]


def test_gsm8k_demonstrations(tokenizer, tmp_path):
    train, test = (str(ROOT / f"gsm8k/{name}.jsonl.gz") for name in ("train", "test"))
    counts = prepare("sft", DataConfig(path=train, eval_path=test, window=1024), tokenizer, tmp_path).summary
    assert (counts["train"]["documents"], counts["eval"]["documents"]) == (7473, 1000)
    assert counts["train"]["dropped"] == counts["train"]["truncated"] == 0
