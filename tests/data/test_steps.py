import random

import pytest

from llm_jax.data.steps import evaluate, first_false_mark, is_true, marked_equations, shared_steps, split_steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("13 - 2 = 11. 11 + 5 = 16. Answer: 16", ["13 - 2 = 11.", " 11 + 5 = 16.", " Answer: 16"]),
        ("It must be 0.5. Answer: 0.5", ["It must be 0.5.", " Answer: 0.5"]),
        ("a. b\nc\n#### 3", ["a. b\n", "c\n", "#### 3"]),
        ("\n\na\n \n\nb\n", ["\n\na\n \n\n", "b\n"]),
        ("one line\n", ["one line\n"]),
        ("one", ["one"]),
        ("Really? Yes!  So. ", ["Really?", " Yes!", "  So. "]),
        (" \n", []),
        ("", []),
    ],
)
def test_split(text, steps):
    assert split_steps(text) == steps


def test_joined_steps_are_the_text():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice("ab. \n!?\r\t\u2028=") for _ in range(rng.randrange(12)))
        steps = split_steps(text)
        assert "".join(steps) == (text if text.strip() else "")
        assert all(step.strip() for step in steps)


@pytest.mark.parametrize(
    ("expression", "result", "true"),
    [
        ("48/2", "24", True),
        ("0.2*50", "10", True),
        ("2*1/2", "1.0", True),
        (".5*10", "5", True),
        ("(3+4)*1,000", "7000", True),
        ("$5*2", "$10", True),
        ("20%*50", "10", True),
        ("-3+5", "2", True),
        ("2/3", "0.67", True),
        ("2/3", "0.66", True),  # cut off
        ("2/3", "0.65", False),
        ("5/2", "3", True),  # rounded
        ("5/2", "2", False),
        ("16-3-4", "8", False),
        ("0.1+0.2", "0.3", True),  # exact, not in floating point
        ("3/0", "0", None),
        ("x+1", "2", None),
        ("", "2", None),
        ("__import__('os')", "0", None),
        ("2**9", "512", None),
    ],
)
def test_equations(expression, result, true):
    assert is_true(expression, result) is true


def test_nothing_but_arithmetic_is_evaluated():
    for text in ("(" * 300, "abs(1)", "[1][0]", "1 if 1 else 2", "9" * 201, "0x10", "True"):
        assert evaluate(text) is None


def test_marks():
    step = "She makes 9 * 2 = $<<9*2=18>>18 and <<5>>5."
    assert marked_equations(step) == [("9*2", "18"), ("5", "")]
    assert first_false_mark(["<<1+1=2>>2\n", "<<2*2=4>>4 <<4+1=6>>6\n", "<<1=2>>"]) == 1
    assert first_false_mark(["no mark", "<<what=3>>"]) is None


def test_shared_steps():
    assert shared_steps(["a", "b", "c"], ["a", "b", "d"]) == 2
    assert shared_steps(["a"], ["b"]) == 0
    assert shared_steps(["a"], ["a", "b"]) == 1
