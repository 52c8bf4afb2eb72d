"""Final answers in GSM8K's marks and in ours."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from llm_jax.data.config import DataConfig, EmbeddedConfig
from llm_jax.data.embedded.problems import careless, is_correct, problems
from llm_jax.jobs.alignment.checker import final_answer, is_right
from llm_jax.jobs.alignment.prompts import Prompt, read_prompts


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("He has 3 * 4 = 12.\n#### 12", "12", True),
        ("#### 1,000.0", "1000", True),
        ("So $5 + $7.\nA: $12 a day", "12", True),
        ("Answer: 12. No, wait. Answer: 13", "12", False),
        ("Answer: 13 first. Then\nAnswer: 12.", "12", True),
        ("It is 12", "12", False),
        ("#### -3", "3", False),
        ("#### 12", "-12", False),
        ("Answer: Paris.", "paris", True),
        ("Answer: Paris, France", "paris", False),
        ("Answer: 0.5", "1/2", False),
        ("#### 72", "72.00", True),
        ("####", "72", False),
    ],
)
def test_answers_of_files(text, answer, right):
    assert is_right(Prompt(0, "f:1", "q", answer), text) == right


def test_word_problems_as_their_own_check_says():
    for i, problem in enumerate(problems(EmbeddedConfig(), "eval", 20)):
        prompt = Prompt(i, f"problem {i}", "q", str(problem.answer), problem=problem)
        guess = careless(problem, EmbeddedConfig(), random.Random(i))
        assert is_right(prompt, problem.careful)
        assert is_right(prompt, guess) == is_correct(problem, guess)


def test_the_last_mark_counts():
    assert final_answer("Answer: 1\n#### 2\nA: 3") == "3"
    assert final_answer("nothing: 1") is None


FOLDER = os.environ.get("LLM_JAX_DATA")


@pytest.mark.real_data
@pytest.mark.skipif(FOLDER is None, reason="LLM_JAX_DATA names no folder of real data")
def test_gsm8k_as_its_authors_mark_it():
    """Every written solution is right by its own answer, and of four models' 4,000 those that the authors say are."""
    folder = Path(str(FOLDER)) / "gsm8k"
    data = DataConfig(path=str(folder / "train.jsonl.gz"), eval_path=str(folder / "test.jsonl.gz"))
    for prompts, count in ((read_prompts(data, "train"), 7473), (read_prompts(data, "eval"), 1000)):
        assert len(prompts) == count
        assert all(prompt.written is not None and is_right(prompt, prompt.written) for prompt in prompts)
        assert all(prompt.written == prompt.columns["answer"] for prompt in prompts)
    marks = []
    with gzip.open(folder / "model_solutions.jsonl.gz") as file:
        for line in file:
            row = json.loads(line)
            prompt = Prompt(0, "", row["question"], final_answer(row["ground_truth"]))
            judged = [value for value in row.values() if isinstance(value, dict)]
            marks += [(is_right(prompt, one["solution"]), one["is_correct"]) for one in judged]
    assert len(marks) == 4000 and all(ours == theirs for ours, theirs in marks)
