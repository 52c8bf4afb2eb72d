"""A run in one process after another goes on behind what hangs, and ends where none gets further."""

import json
import sys

import pytest

from llm_jax.base.journal import Journal, run_all

BEGIN = """
import os, sys, time
from pathlib import Path
from llm_jax.base.journal import Journal
journal = Journal(Path(sys.argv[1].removeprefix("--journal=")), patience=1)
"""


def run(tmp_path, text):
    """The exit status of a run whose processes do this, and what they wrote."""
    script, path = tmp_path / "script.py", tmp_path / "journal"
    script.write_text(BEGIN + text)
    status = run_all([sys.executable, str(script)], path)
    return status, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_goes_on_behind_what_hangs(tmp_path, capfd):
    """The first process sleeps in "b" until its patience is over, the second one leaves it out."""
    status, made = run(
        tmp_path,
        """
journal.recall("start", lambda: 7)
for key in "abc":
    if journal.is_over(key):
        continue
    if not journal.began(key):
        journal.write(begin=key)
        if key == "b":
            time.sleep(60)
    journal.write(over=key)
journal.write(end=True)
sys.exit(5)
""",
    )
    over = [{"over": "b"}, {"begin": "c"}, {"over": "c"}, {"end": True}]
    assert status == 5 and made == [{"start": 7}, {"begin": "a"}, {"over": "a"}, {"begin": "b"}, *over]
    assert "b: the process ended with status 1; another one goes on\n" in capfd.readouterr().err


def test_what_is_done_again_may_end_a_process_the_second_time(tmp_path):
    """ "a" is done three times by each process, and "b" breaks the device at the second time."""
    status, made = run(
        tmp_path,
        """
with journal.whole():
    for turn in range(3):
        for key in "ab":
            if not journal.began(key):
                with journal.at(key):
                    if key == "b" and turn == 1:
                        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
""",
    )
    a, b = ([{"begin": key}, {"over": key}] for key in "ab")
    assert status == 0 and made == [*a, *b, *a, b[0], *a, *a, *a, {"end": True}]


@pytest.mark.parametrize(
    "text, status, processes",
    [
        ("sys.exit(4)", 4, 0),  # nothing is heard of it
        ("with journal.whole(): journal.write(begun=1); sys.exit(2)", 2, 1),  # what another one would only meet again
        ("journal.write(begun=1); os._exit(6)", 6, 2),  # the second one says nothing new
    ],
)
def test_a_run_that_gets_no_further_ends(tmp_path, text, status, processes):
    ended, made = run(tmp_path, text)
    assert ended == status and made.count({"begun": 1}) == processes


def test_other_errors_are_over_and_go_on(tmp_path):
    journal = Journal(tmp_path / "journal", 0)
    with pytest.raises(ValueError), journal.at("a"):
        raise ValueError
    assert Journal(tmp_path / "journal", 0).began("a") == 0
