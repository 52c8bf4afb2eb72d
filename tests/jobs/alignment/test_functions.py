"""Anybody's function in a process of its own: what it may do, and what becomes of the run."""

import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.jobs.alignment.functions import CallFailed, FunctionProcess
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.jobs.alignment.scorers import check_scorer, open_scorer
from llm_jax.jobs.config import ScorerConfig

MODULE = """
import os, sys, time
print("on import")

def length(prompts, completions, **columns):
    print("said aloud")
    assert len(prompts) == len(completions) == len(columns["answer"])
    return [float(len(text)) for text in completions]

def moody(prompts, completions, **columns):
    word = completions[0]
    if word == "raise":
        raise ValueError("a bad\\nanswer")
    if word == "hang":
        time.sleep(60)
    if word == "die":
        os._exit(3)
    if word == "interrupt":
        raise KeyboardInterrupt
    return {"none": [None], "nan": [float("nan")], "few": [], "text": ["good"], "true": [True]}.get(word, [1.5])

def judge(prompts, completions, **columns):
    return [0.75 if a < b else 0.25 for a, b in completions]

not_a_function = 3
"""
PROMPTS = [Prompt(i, f"file:{i + 1}", "q", columns={"answer": "7"}) for i in range(3)]


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "judging.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def test_scores_come_back_whatever_is_printed():
    config = ScorerConfig(kind="function", function="judging.length")
    with open_scorer(config, None) as scorer:
        scores = scorer(PROMPTS, [["a", "bbb"], ["cc", ""], ["d" * 100_000, "e"]])
    assert [None if one is None else one.tolist() for one in scores] == [[1, 3], [2, 0], [100_000, 1]]


def test_pairs_are_asked_once_and_make_probabilities():
    config = ScorerConfig(kind="function", function="judging.judge", pairwise=True)
    with open_scorer(config, None) as scorer:
        (wins,) = scorer(PROMPTS[:1], [["b", "a", "c"]])
    assert wins is not None
    np.testing.assert_array_equal(wins, [[0.5, 0.25, 0.75], [0.75, 0.5, 0.75], [0.25, 0.25, 0.5]])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("raise", "raised ValueError: a bad answer"),
        ("hang", "did not return within 0.3 s"),
        ("die", "ended its process with status 3"),
        ("interrupt", "raised KeyboardInterrupt"),
        ("nan", "returned nan, which is not a finite number"),
        ("few", r"returned \[\], not a list of 1 numbers"),
        ("text", "returned 'good', which is not a finite number"),
    ],
)
def test_a_call_that_fails_ends_the_run_or_is_left_out(word, said, capsys):
    with (
        open_scorer(ScorerConfig(kind="function", function="judging.moody", timeout=0.3), None) as scorer,
        pytest.raises(UserError, match=f"^file:1: scorer.function=judging.moody {said}"),
    ):
        scorer(PROMPTS[:1], [[word]])
    lenient = ScorerConfig(kind="function", function="judging.moody", timeout=0.3, on_error="skip")
    with open_scorer(lenient, None) as scorer:
        scores = scorer(PROMPTS, [["fine"], [word], ["fine"]])
    assert [None if one is None else one.tolist() for one in scores] == [[1.5], None, [1.5]]
    assert "file:2" in capsys.readouterr().err


def test_none_is_no_score():
    with open_scorer(ScorerConfig(kind="function", function="judging.moody"), None) as scorer:
        assert scorer(PROMPTS[:1], [["none"]]) == [None]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "function"}, "scorer.function is not set"),
        ({"kind": "function", "function": "judging.lenth"}, "the module judging has no function lenth"),
        ({"kind": "function", "function": "judging.not_a_function"}, "has no function not_a_function"),
        ({"kind": "function", "function": "no_such.thing"}, "ModuleNotFoundError"),
        ({"kind": "function", "function": "length"}, "it has to be a dotted name"),
        ({"kind": "function", "function": "judging.length", "timeout": 0.0}, "scorer.timeout is 0.0"),
        ({"kind": "function", "function": "judging.length", "model": "m"}, "scorer.model=m is not read"),
        ({"kind": "reward"}, "scorer.model is not set"),
        ({"kind": "answer", "function": "judging.length"}, "scorer.function=judging.length is not read"),
        ({"kind": "answer", "pairwise": True}, "scorer.pairwise=True is not read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sampled(fields, said):
    with pytest.raises(UserError) as error:
        check_scorer(ScorerConfig(**fields))
    assert said in str(error.value)


def test_a_child_that_was_ended_is_started_anew():
    with FunctionProcess("judging.moody", timeout=0.3) as process:
        with pytest.raises(CallFailed, match="did not return"):
            process.call({"prompts": [""], "completions": ["hang"]})
        assert process.call({"prompts": [""], "completions": ["fine"]}) == [1.5]
