import random

import pytest

from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded import stepwise
from llm_jax.data.embedded.problems import Problem, make_problem
from llm_jax.data.embedded.stepwise import first_wrong_step, right_steps, wrong_step
from llm_jax.data.steps import split_steps

CONFIG = EmbeddedConfig(records=200, eval_records=20)
BEN = Problem("Ben", "pencil", 13, (("-", 2), ("+", 5)), ("Ben has 13 pencils.", "", ""), "How many?")


def test_right_steps_are_the_careful_answer():
    for index in range(100):
        problem = make_problem(CONFIG, "train", random.Random(index))
        steps = right_steps(problem)
        assert split_steps(problem.careful) == steps
        assert first_wrong_step(problem, steps) is None


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("13 - 2 = 11. 11 + 5 = 16. Answer: 16", None),
        ("13 - 2 = 11. 11 + 5 = 16.", None),  # too short, not wrong
        ("13 - 2 = 12. 12 + 5 = 17. Answer: 17", 0),
        ("13 - 2 = 11. 11 - 5 = 6. Answer: 6", 1),
        ("13 - 2 = 11. 11 + 5 = 16. 16 + 5 = 21. Answer: 21", 2),
        ("13 - 2 = 11. 11 + 5 = 16. Answer: 11", 2),
        ("13 - 2 = 11. Answer: 16", None),  # right, one step left out
        ("It must be 16. Answer: 16", 0),
        ("13 - 2 = 11. 11 + 5 = 16 13 - 2 = 11. Answer: 16", 1),
    ],
)
def test_first_wrong_step(text, first):
    assert first_wrong_step(BEN, split_steps(text)) == first


def test_wrong_steps_are_found_where_they_are():
    for index in range(300):
        rng = random.Random(index)
        problem = make_problem(CONFIG, "train", rng)
        steps = right_steps(problem)
        number = rng.randrange(len(steps))
        steps[number] = wrong_step(problem, number, CONFIG, rng)
        assert first_wrong_step(problem, steps) == number


def test_preferences():
    records = list(stepwise.preferences(CONFIG, "train"))
    assert records == list(stepwise.preferences(CONFIG, "train")) and len(records) == 200
    assert all(r["chosen"] != r["rejected"] and r["chosen_ends"] == r["rejected_ends"] for r in records)
    assert {len(split_steps(r["prefix"])) for r in records} == {0, 1, 2, 3}
    assert all(r["chosen_ends"] == r["chosen"].startswith(" Answer") for r in records)
