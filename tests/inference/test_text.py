"""Stop strings and half characters, however the tokens are cut."""

import pytest

from llm_jax.inference.text import TextTracker

TEXT = "naïve → 😀 café, END of it"


def run(tokenizer, ids, stop, size):
    tracker = TextTracker(tokenizer, stop)
    pieces = []
    for first in range(0, len(ids), size):
        pieces.append(tracker.push(ids[first : first + size]))
        if tracker.stopped:
            break
    else:
        pieces.append(tracker.finish())
    return tracker, pieces


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_add_up_and_hold_whole_characters(tiny, size):
    ids = [i for char in TEXT for i in tiny.tokenizer.encode_bytes(char.encode())]  # many characters of many tokens
    tracker, pieces = run(tiny.tokenizer, ids, (), size)
    assert "".join(pieces) == tracker.text == TEXT
    assert tracker.tokens == ids
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "naïve → 😀 café, "),
        (("→ 😀",), "naïve "),
        (("é, E", "café"), "naïve → 😀 "),
        (("a",), "n"),
        (("ENDING", "of it!"), TEXT),
    ],
)
def test_stop_strings_end_the_text_before_them(tiny, size, stop, expected):
    ids = tiny.tokenizer.encode(TEXT)
    tracker, pieces = run(tiny.tokenizer, ids, stop, size)
    assert "".join(pieces) == tracker.text == expected
    assert tracker.stopped == (expected != TEXT)
    # The last token is the one that completed the string.
    if tracker.stopped:
        assert any(s in tiny.tokenizer.decode(tracker.tokens) for s in stop)
        assert not any(s in tiny.tokenizer.decode(tracker.tokens[:-1]) for s in stop)


def test_nothing_is_shown_that_a_stop_string_may_take_back(tiny):
    tracker = TextTracker(tiny.tokenizer, ("abc",))
    shown = [tracker.push(tiny.tokenizer.encode(char)) for char in "xabab"]
    assert shown == ["x", "", "", "ab", ""]
    assert tracker.finish() == "ab"


def test_an_unfinished_character_becomes_a_replacement_at_the_end(tiny):
    tracker = TextTracker(tiny.tokenizer)
    assert tracker.push(tiny.tokenizer.encode_bytes("a😀".encode()[:3])) == "a"
    assert tracker.finish() == "\ufffd"
