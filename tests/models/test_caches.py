"""Decoding through caches equals the full forward; ragged rows equal each alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.cache import Meta, init_caches
from llm_jax.models.config import ModelConfig
from llm_jax.models.parameter import bind
from tests.models.cached import cached_model

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4, num_kv_heads=2, init_std=0.2
)
TOKENS = jax.random.randint(jax.random.key(1), (3, 16), 0, 61)
SLOTS = 20


@pytest.fixture(scope="module")
def model():
    return cached_model(CONFIG)


def test_token_by_token_equals_full_forward(model):
    _, _, params, step, full = model
    caches, out = init_caches(CONFIG, 3, SLOTS), []
    for t in range(16):
        lengths = jnp.full((3,), t)
        logits, caches = step(params, TOKENS[:, t : t + 1], caches, Meta(lengths[:, None], None, lengths))
        out.append(logits)
    np.testing.assert_allclose(jnp.concatenate(out, 1), full(TOKENS), atol=1e-5)


def test_ragged_rows_equal_each_alone(model):
    """Prompts of 3, 9 and 5 tokens padded to 9, then 6 more each."""
    _, _, params, step, full = model
    lengths = jnp.array([3, 9, 5])
    positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
    real = (positions < lengths[:, None]).astype(jnp.int32)
    caches = init_caches(CONFIG, 3, SLOTS)
    logits, caches = step(params, TOKENS[:, :9], caches, Meta(positions, real, jnp.zeros_like(lengths)))
    rows = [[logits[b, : lengths[b]]] for b in range(3)]
    for t in range(6):
        at = lengths + t
        new = jnp.take_along_axis(TOKENS, at[:, None], axis=1)
        logits, caches = step(params, new, caches, Meta(at[:, None], None, at))
        for b in range(3):
            rows[b].append(logits[b])
    for b in range(3):
        expected = full(TOKENS[b : b + 1, : lengths[b] + 6])[0]
        np.testing.assert_allclose(jnp.concatenate(rows[b]), expected, atol=1e-5)
    assert not caches[0].k[0, :, 9:].any()  # padding left no trace


def test_scanned_parameters_decode_too(model):
    decoder, params, unstacked, step, _ = model
    meta = Meta(jnp.broadcast_to(jnp.arange(16), (3, 16)))
    stacked = jax.jit(lambda p, c: bind(decoder, p)(TOKENS, caches=c, meta=meta)[:2])
    hidden, caches = stacked(params, init_caches(CONFIG, 3, SLOTS))
    logits, expected = step(unstacked, TOKENS, init_caches(CONFIG, 3, SLOTS), meta)
    np.testing.assert_array_equal(jax.jit(lambda p, h: bind(decoder, p).logits(h))(params, hidden), logits)
    jax.tree.map(np.testing.assert_array_equal, caches, expected)


def test_caches_need_meta(model):
    decoder, params, *_ = model
    with pytest.raises(UserError, match="caches need a meta"):
        bind(decoder, params)(TOKENS, caches=init_caches(CONFIG, 3, SLOTS))


def test_cache_shapes():
    caches: Any = init_caches(CONFIG, 2, 7, "bfloat16")
    assert len(caches) == 3
    assert caches[0].k.shape == (2, 2, 7, 6) and caches[0].v.dtype == jnp.bfloat16
