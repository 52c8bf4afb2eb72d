"""Windows: the packed forward against a mask written out, and ring caches against the packed forward."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.cache import ContiguousCache, Empty, Meta, SlidingCache, grown, init_caches
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.families import family
from llm_jax.models.init import init_params
from llm_jax.models.parameter import bind
from tests.models.cached import cached_model

WINDOW = 6
CONFIG = ModelConfig(
    family="mistral",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    init_std=0.2,
    window=WINDOW,
)
TOKENS = jax.random.randint(jax.random.key(1), (3, 32), 0, 61)
LENGTHS = jnp.asarray([3, 19, 8])


@pytest.fixture(scope="module")
def model():
    _, _, *rest = cached_model(CONFIG)
    return rest


def test_the_packed_forward_honours_the_window(model):
    """A window that no token leaves changes nothing; this one changes exactly the tokens past it, in one layer."""
    *_, full = model
    one = dataclasses.replace(CONFIG, num_layers=1)
    params = init_params(Decoder(one), 0)

    def logits(config):
        bound = bind(Decoder(config), params)
        return bound.logits(bound(TOKENS)[0])

    windowed, wide, none = (logits(dataclasses.replace(one, window=w)) for w in (WINDOW, 32, None))
    np.testing.assert_allclose(wide, none, atol=1e-6)
    apart = np.abs(windowed - none).max((0, 2)) > 1e-4
    np.testing.assert_array_equal(apart, np.arange(32) >= WINDOW)
    # The last token of a row sees the last WINDOW tokens and no others, where there is one layer.
    cut = jax.jit(lambda t: bind(Decoder(one), params)(t, positions=jnp.arange(26, 32)[None].repeat(3, 0))[0])
    whole = bind(Decoder(one), params)(TOKENS)[0]
    np.testing.assert_allclose(cut(TOKENS[:, -WINDOW:])[:, -1], whole[:, -1], atol=1e-5)


def test_token_by_token_round_the_ring(model):
    """32 tokens through 6 slots: each as in the full forward."""
    params, step, full = model
    caches, out = init_caches(CONFIG, 3, 32), []
    assert all(isinstance(c, SlidingCache) and c.k.shape[2] == WINDOW for c in caches)
    for t in range(32):
        at = jnp.full((3, 1), t)
        logits, caches = step(params, TOKENS[:, t : t + 1], caches, Meta(at, None, at[:, 0]))
        out.append(logits)
    np.testing.assert_allclose(jnp.concatenate(out, 1), full(TOKENS), atol=1e-5)


@pytest.mark.parametrize("empty", [True, False])
def test_ragged_prompts_longer_and_shorter_than_the_window(model, empty):
    """Prompts of 3, 19 and 8 tokens in one call, 5 more in another, then one by one to 31."""
    params, step, full = model
    expected = full(TOKENS)

    def feed(caches, starts, lengths, width):
        index = jnp.arange(width)
        at = starts[:, None] + index
        real = (index < lengths[:, None]).astype(jnp.int32)
        new = jnp.take_along_axis(TOKENS, jnp.minimum(at, 31), axis=1)
        logits, caches = step(params, jnp.where(real, new, 60), caches, Meta(at, real, starts))
        for b in range(3):
            begin, count = int(starts[b]), int(lengths[b])
            np.testing.assert_allclose(logits[b, :count], expected[b, begin : begin + count], atol=1e-5)
        return caches

    caches: Any = init_caches(CONFIG, 3, 32)
    caches = feed(tuple(map(Empty, caches)) if empty else caches, jnp.zeros(3, jnp.int32), LENGTHS, 20)
    caches = feed(caches, LENGTHS, jnp.asarray([5, 2, 4]), 5)
    lengths = LENGTHS + jnp.asarray([5, 2, 4])
    for _ in range(10):
        caches = feed(caches, lengths, jnp.ones(3, jnp.int32), 1)
        lengths += 1


def test_memory_is_bounded_by_the_window_and_grows_up_to_it():
    full = dataclasses.replace(CONFIG, window=None)
    short, long, whole = (init_caches(*of)[0] for of in ((CONFIG, 2, 4), (CONFIG, 2, 1000), (full, 2, 4)))
    assert isinstance(short, SlidingCache) and isinstance(long, SlidingCache) and isinstance(whole, ContiguousCache)
    assert (short.k.shape[2], long.k.shape[2]) == (4, WINDOW)
    assert grown(short, 5).k.shape[2] == 5 and grown(short, 100).k.shape[2] == WINDOW
    assert grown(whole, 100).v.shape[2] == 100


def test_a_ring_not_yet_full_keeps_its_tokens_when_it_grows(model):
    params, step, full = model
    at = jnp.broadcast_to(jnp.arange(4), (3, 4))
    _, caches = step(params, TOKENS[:, :4], init_caches(CONFIG, 3, 4), Meta(at, None, at[:, 0]))
    caches = tuple(grown(c, 32) for c in caches)
    expected = full(TOKENS)
    for t in range(4, 12):
        at = jnp.full((3, 1), t)
        logits, caches = step(params, TOKENS[:, t : t + 1], caches, Meta(at, None, at[:, 0]))
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)


def test_windows_and_families_that_do_not_fit():
    for change, message in (
        ({"window": 0}, "model.window is 0"),
        ({"family": "llama"}, "model.window=.: the llama family has None there"),
        ({"mlp_bias": True}, "model.mlp_bias=True: the mistral family has False there"),
    ):
        config = dataclasses.replace(CONFIG, **change)
        with pytest.raises(UserError, match=message):
            family(config.family).check(config)
