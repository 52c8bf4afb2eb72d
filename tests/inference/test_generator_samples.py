"""Samples that share a prefill, caches that grow, log-probabilities, and models with a window."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.inference import Generator, SamplingParams
from llm_jax.inference import batch as batch_module
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import bind

DRAWN = SamplingParams(max_tokens=20, temperature=1.1, top_p=0.95, ignore_eos=True)
PROMPTS = [[7, 9, 11, 200, 31, 5, 90, 14], [44, 45], list(range(30, 55))]


@pytest.fixture(scope="module")
def generator(tiny) -> Generator:
    return Generator(tiny, tiny.tokenizer, max_batch=8, buckets=(64,), chunk=5)


def full_logprobs(model, sequence):
    bound = bind(model.decoder, model.params)
    return np.asarray(jax.nn.log_softmax(bound.logits(bound(jnp.asarray([sequence]))[0])[0]))


def test_samples_of_a_prompt_are_prefilled_once(tiny, generator, monkeypatch):
    """Three prompts four times each: eight rows at a time from two prompts; every sample as it would be alone."""
    shapes = []

    def counted(*args, **options):
        shapes.append((args[2].shape, None if args[4] is None else args[4].shape))
        return start(*args, **options)

    start = batch_module.start
    monkeypatch.setattr(batch_module, "start", counted)
    monkeypatch.setattr(Generator, "parts", lambda self, size: 1)
    together = generator.generate(PROMPTS, dataclasses.replace(DRAWN, n=4))
    assert shapes == [((2, 64), (8,)), ((2, 64), (8,))]
    monkeypatch.undo()
    alone = Generator(tiny, tiny.tokenizer, max_batch=1, buckets=(64,), chunk=5)
    for i, prompt in enumerate(PROMPTS):
        expected = alone.generate([prompt], dataclasses.replace(DRAWN, n=4))
        assert [c.tokens for c in together[4 * i : 4 * i + 4]] == [c.tokens for c in expected]


def test_logprobs_are_the_full_forwards(tiny, generator):
    """Chosen and likeliest tokens of every place, whatever temperature and filters; a row asks for its own number."""
    params = [dataclasses.replace(DRAWN, logprobs=k) for k in (5, 0, 2)]
    for prompt, p, out in zip(PROMPTS, params, generator.generate(PROMPTS, params)):
        expected = full_logprobs(tiny, prompt + out.tokens)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(out.logprobs, expected[np.arange(20), out.tokens], atol=1e-5)
        assert len(out.top_logprobs) == (20 if p.logprobs else 0)
        for place, top in zip(expected, out.top_logprobs):
            order = np.argsort(-place)[: p.logprobs]
            np.testing.assert_allclose([value for _, value in top], place[order], atol=1e-5)
            assert [token for token, _ in top] == order.tolist() or np.diff(place[order]).max() > -1e-5


def test_logprobs_end_with_the_output(tiny, generator):
    params = dataclasses.replace(DRAWN, logprobs=2)
    (whole,) = generator.generate(PROMPTS[:1], params)
    (cut,) = generator.generate(PROMPTS[:1], dataclasses.replace(params, stop=(whole.text[4:6],)))
    assert len(cut.top_logprobs) == len(cut.logprobs) == len(cut.tokens) < 20
    assert cut.top_logprobs == whole.top_logprobs[: len(cut.tokens)]
    pieces = list(generator.stream(PROMPTS[:1], params))
    assert [top for d in pieces for top in d.top_logprobs] == whole.top_logprobs
    with pytest.raises(UserError, match="logprobs is 289"):
        generator.generate(PROMPTS[:1], SamplingParams(logprobs=289))


def test_growing_caches_change_no_token(tiny, generator, monkeypatch):
    """From 10 slots to 45 in steps of the buckets, against caches of 64 from the start."""
    sizes = []

    def counted(caches, *, cache_len):
        sizes.append(cache_len)
        return grow(caches, cache_len=cache_len)

    grow = batch_module.grow
    monkeypatch.setattr(batch_module, "grow", counted)
    monkeypatch.setattr(Generator, "parts", lambda self, size: 1)
    small = Generator(tiny, tiny.tokenizer, max_batch=8, buckets=(8, 16, 24, 32, 48, 64), chunk=5)
    ours = small.generate(PROMPTS[:2], DRAWN)
    assert sizes == [24, 32]
    assert [c.tokens for c in ours] == [c.tokens for c in generator.generate(PROMPTS[:2], DRAWN)]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_are_decoded_side_by_side(tiny, generator, monkeypatch, parts):
    """Rows of different lengths, in a batch that parts do not divide or do not all have a row of: each as alone."""
    params = [dataclasses.replace(DRAWN, max_tokens=count) for count in (20, 3, 11)]
    expected = [generator.generate([prompt], p)[0] for prompt, p in zip(PROMPTS, params)]
    monkeypatch.setattr(Generator, "parts", lambda self, size: parts)
    ours = generator.generate(PROMPTS, params)
    assert [(c.tokens, c.finish_reason) for c in ours] == [(c.tokens, c.finish_reason) for c in expected]
    pieces = list(generator.stream(PROMPTS, params))
    assert [[t for d in pieces if d.prompt == i for t in d.tokens] for i in range(3)] == [c.tokens for c in expected]


def test_a_failure_in_a_part_ends_the_call(tiny, generator, monkeypatch):
    def failing(*args, **options):
        raise RuntimeError("lost")

    monkeypatch.setattr(Generator, "parts", lambda self, size: 2)
    monkeypatch.setattr(batch_module, "decode_chunk", failing)
    with pytest.raises(RuntimeError, match="lost"):
        generator.generate(PROMPTS, DRAWN)


def test_a_model_with_a_window(tiny):
    """Greedy tokens are the argmax of the windowed full forward, through rings that wrap, in a ragged batch."""
    config = dataclasses.replace(tiny.config, family="mistral", window=7)
    model = dataclasses.replace(tiny, config=config, decoder=Decoder(config))
    generator = Generator(model, max_batch=4, buckets=(4, 16, 32, 64), chunk=3)
    for prompt, out in zip(PROMPTS, generator.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=20))):
        logits = full_logprobs(model, prompt + out.tokens)[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(logits.argmax(-1), out.tokens)
        np.testing.assert_allclose(out.logprobs, logits.max(-1), atol=1e-5)
