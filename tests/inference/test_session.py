"""Prompts that begin as the last one ended: what is reused, and that it changes no token."""

import dataclasses

import pytest

from llm_jax.inference import Generator, SamplingParams, Session
from llm_jax.models.decoder import Decoder

DRAWN = SamplingParams(max_tokens=9, temperature=1.1, repetition_penalty=1.2, ignore_eos=True)
FIRST = [7, 9, 11, 200, 31, 5, 90, 14]


def model_of(tiny, window):
    config = dataclasses.replace(tiny.config, family="mistral", window=window)
    return dataclasses.replace(tiny, config=config, decoder=Decoder(config))


def answer(session: Session, ids, params=DRAWN):
    tokens, text = [], ""
    for delta in session.stream(ids, params):
        tokens += delta.tokens
        text += delta.text
    return tokens, text


@pytest.mark.parametrize("window", [None, 6])
def test_turns_reuse_the_past_and_change_no_token(tiny, window):
    generator = Generator(model_of(tiny, window), tiny.tokenizer, max_batch=1, buckets=(8, 16, 32, 64), chunk=4)
    session, ids, held = Session(generator), list(FIRST), 0
    for turn in range(4):
        (expected,) = generator.generate([ids], DRAWN)
        assert answer(session, ids) == (expected.tokens, expected.text)
        # All but the newest token is in the caches when a turn has ended.
        assert session.reused == held
        held = len(ids) + len(expected.tokens) - 1
        ids = [*ids, *expected.tokens, 3 + turn, 50]


def test_a_changed_past_is_run_again_from_where_it_changed(tiny):
    generator = Generator(tiny, tiny.tokenizer, max_batch=1, buckets=(64,), chunk=4)
    session = Session(generator)
    answer(session, FIRST)
    other = [*FIRST[:5], 60, 61]
    (expected,) = generator.generate([other], DRAWN)
    assert answer(session, other)[0] == expected.tokens
    assert session.reused == 5
    # The same prompt again: all but its last token, whose logits are wanted.
    assert answer(session, other)[0] == expected.tokens
    assert session.reused == 6
    ring = Session(Generator(model_of(tiny, 6), max_batch=1, buckets=(64,), chunk=4))
    answer(ring, FIRST)
    assert answer(ring, other)[0] == ring.generator.generate([other], DRAWN)[0].tokens
    assert ring.reused == 0


@pytest.mark.parametrize("window", [None, 6])
def test_an_answer_left_in_the_middle_or_stopped(tiny, window):
    generator = Generator(model_of(tiny, window), tiny.tokenizer, max_batch=1, buckets=(64,), chunk=4)
    session = Session(generator)
    stream = session.stream(FIRST, DRAWN, every=2)
    told = [*next(stream).tokens, *next(stream).tokens]
    stream.close()
    ids = [*FIRST, *told, 40]
    (expected,) = generator.generate([ids], DRAWN)
    assert answer(session, ids)[0] == expected.tokens
    assert session.reused == (len(FIRST) + len(told) - 1 if window is None else 0)
    stopping = dataclasses.replace(DRAWN, stop=(expected.text[2:4],))
    tokens, text = answer(session, ids, stopping)
    assert text == expected.text[: expected.text.index(expected.text[2:4])]
    ids = [*ids, *tokens, 41]
    assert answer(session, ids)[0] == generator.generate([ids], DRAWN)[0].tokens
