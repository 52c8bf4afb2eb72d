import random
import re

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded import problems as P

CONFIG = EmbeddedConfig(records=1500, eval_records=400)


def evaluate(problem):
    """The answer read off the prompt's own words."""
    start, *numbers = (int(n) for n in re.findall(r"\d+", problem.prompt))
    signs = ["+" if re.search(r"more|given", sentence) else "-" for sentence in problem.sentences[1:]]
    total = start
    for sign, number in zip(signs, numbers, strict=True):
        total += number if sign == "+" else -number
    return total


@pytest.mark.parametrize("split", ["train", "eval"])
def test_problems_say_what_they_compute(split):
    for problem in P.problems(CONFIG, split, 400):
        assert problem.answer == evaluate(problem)
        assert problem.prompt.startswith(f"{problem.name} has {problem.start} ")
        assert CONFIG.min_operations <= len(problem.steps) <= CONFIG.max_operations
        assert all(0 <= number <= CONFIG.max_number for number in (problem.start, *problem.totals))
        assert not re.search(r"\b1 \w+s\b(?! to)", problem.sentences[0])


def test_careful_and_careless_answers():
    rng = random.Random(0)
    right = 0
    for problem in P.problems(CONFIG, "eval", 400):
        assert P.is_careful(problem.careful) and P.is_correct(problem, problem.careful)
        for a, sign, b, c in P.EQUATION.findall(problem.careful):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        guess = P.careless(problem, CONFIG, rng)
        assert not P.is_careful(guess)
        right += P.is_correct(problem, guess)
    assert 0.04 < right / 400 < 0.2


def test_checkers():
    problem = P.Problem("Ben", "pen", 13, (("-", 2), ("+", 5)), ("Ben has 13 pens.", "...", "..."), "How many?")
    assert problem.answer == 16 and problem.careful == "13 - 2 = 11. 11 + 5 = 16. Answer: 16"
    for text, correct, careful in [
        ("13 - 2 = 11. 11 + 5 = 16. Answer: 16", True, True),
        ("13 - 2 = 12. Answer: 12", False, True),
        ("It must be 16. Answer: 16<|im_end|>", True, False),
        ("Answer: 1. Answer: 16", True, False),
        ("Answer: 16. Answer: 1", False, False),
        ("Answer: 160", False, False),
        ("Answer: sixteen", False, False),
        ("Answer: 16. 13 - 2 = 11", True, False),
        ("", False, False),
    ]:
        assert (P.is_correct(problem, text), P.is_careful(text)) == (correct, careful), text


def test_no_held_out_sequence_of_numbers_is_trained_on():
    streams = (P.demonstrations, P.preferences)
    seen = {split: set() for split in ("train", "eval")}
    for split in ("train", "eval"):
        prompts = seen[split]
        for stream in streams:
            prompts.update(re.sub(r"[A-Z]\w+", "X", r["prompt"][0]["content"]) for r in stream(CONFIG, split))
        numbers = {tuple(re.findall(r"\d+", prompt)) for prompt in prompts}
        assert len(numbers) > 300
    assert not seen["train"] & seen["eval"]
    keys = {split: {(p.start, p.steps) for p in P.problems(CONFIG, split, 2000)} for split in ("train", "eval")}
    assert not keys["train"] & keys["eval"]


def test_stories_work_every_step_and_never_answer():
    for record in P.stories(CONFIG, "train"):
        assert "Answer" not in record["text"]
        for a, sign, b, c in P.EQUATION.findall(record["text"]):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_a_record_depends_on_its_number_alone():
    few = EmbeddedConfig(records=3)
    for stream in (P.demonstrations, P.preferences, P.stories):
        assert list(stream(few, "train")) == list(stream(CONFIG, "train"))[:3]


def test_share_of_careful_writers():
    answers = [record["completion"][0]["content"] for record in P.demonstrations(CONFIG, "train")]
    assert sum(map(P.is_careful, answers)) / len(answers) == pytest.approx(CONFIG.careful_fraction, abs=0.04)
    assert {answer.split()[0] for answer in answers if not P.is_careful(answer)} == {"It"}


def test_settings_without_problems():
    with pytest.raises(UserError, match="leaves no held-out problems"):
        P.problems(EmbeddedConfig(max_number=2, max_operations=1), "eval", 50)
