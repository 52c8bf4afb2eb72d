"""Prefix language models generate as their full forward says, alone and beside others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.inference import Generator, SamplingParams, Session
from llm_jax.models.config import RopeScaling
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import bind

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
PROMPTS = [[7, 9, 11, 200, 31, 5, 90, 14, 8, 60, 77, 12], [41, 250, 6], [130, 24, 24, 99, 18, 3, 70]]
LONGROPE = RopeScaling("longrope", 4.0, 16, short_factor=(1.0, 1.5, 2.0, 2.5), long_factor=(2.0, 5.0, 9.0, 30.0))


def full_forward(model):
    """`(tokens, prefix) -> log-probabilities` of what comes next, without a cache."""

    @jax.jit
    def logps(row, length, prefix):
        bound, index = bind(model.decoder, model.params), jnp.arange(32)[None]
        hidden, _, _ = bound(row, None, (index < length).astype(jnp.int32), prefix=index < prefix)
        return jax.nn.log_softmax(bound.logits(hidden)[0, length - 1])

    def padded(tokens, prefix):
        return logps(np.pad(tokens, (0, 32 - len(tokens)))[None], len(tokens), prefix)

    return padded


@pytest.mark.parametrize("scaling", [None, LONGROPE], ids=["plain", "longrope"])
def test_greedy_tokens_are_the_full_forwards(tiny, scaling):
    """Ragged prompts in one batch, two samples of each, as if each were alone. LongRoPE makes caches anew at 16 tokens,
    its trained length."""
    config = dataclasses.replace(tiny.config, family="llm_jax", prefix_lm=True, rope_scaling=scaling)
    model = dataclasses.replace(tiny, config=config, decoder=Decoder(config))
    generator, full = Generator(model, max_batch=8, buckets=(32,), chunk=4), full_forward(model)
    done = generator.generate(PROMPTS, dataclasses.replace(GREEDY, n=2))
    for i, prompt in enumerate(PROMPTS):
        tokens, found = list(prompt), []
        for _ in range(GREEDY.max_tokens):
            found.append(full(tokens, len(prompt)))
            tokens.append(int(jnp.argmax(found[-1])))
        assert np.abs(full(prompt, 0) - found[0]).max() > 1e-2  # What the prefix is for.
        for sample in done[2 * i : 2 * i + 2]:
            assert sample.tokens == tokens[len(prompt) :]
            np.testing.assert_allclose(sample.logprobs, [logps.max() for logps in found], atol=1e-5)


def test_a_session_runs_all_of_a_longer_prompt_again(tiny):
    config = dataclasses.replace(tiny.config, family="llm_jax", prefix_lm=True)
    model = dataclasses.replace(tiny, config=config, decoder=Decoder(config))
    generator = Generator(model, max_batch=1, buckets=(32,), chunk=4)
    session, ids = Session(generator), PROMPTS[0]
    for _ in range(2):
        (expected,) = generator.generate([ids], GREEDY)
        assert [token for delta in session.stream(ids, GREEDY) for token in delta.tokens] == expected.tokens
        assert session.reused == 0
        ids = [*ids, *expected.tokens[:5], 50]
