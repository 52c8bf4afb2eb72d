"""Cached decoding against the full forward."""

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.inference import decode_step, decoding_decoder, prefill
from llm_jax.models.cache import init_caches
from llm_jax.models.decoder import unstack
from llm_jax.models.parameter import bind

LENGTHS = np.asarray([5, 1, 9, 12], np.int32)
STEPS = 6


def test_prefill_and_steps_equal_the_full_forward(tiny):
    """Logits of ragged prompts and of each token after them, 1e-5 of the full forward's largest."""
    total = int(LENGTHS.max()) + STEPS
    tokens = np.random.default_rng(1).integers(0, tiny.config.vocab_size, (4, total)).astype(np.int32)
    bound = bind(tiny.decoder, tiny.params)
    full = np.asarray(jax.jit(lambda t: bound.logits(bound(t)[0]))(tokens))
    decoder, params = decoding_decoder(tiny.config), unstack(tiny.params, tiny.decoder)
    rows = np.arange(4)

    def assert_equal(logits, positions):
        expected = full[rows, positions]
        assert np.abs(np.asarray(logits) - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())

    # Padding is filled with tokens that would show if they were seen.
    logits, caches = prefill(decoder, params, init_caches(tiny.config, 4, 24), tokens[:, :12], LENGTHS)
    assert_equal(logits, LENGTHS - 1)
    for step in range(STEPS):
        lengths = LENGTHS + step
        logits, caches = decode_step(decoder, params, caches, tokens[rows, lengths], lengths)
        assert_equal(logits, lengths)


def test_caches_are_donated_and_hold_nothing_of_padding(tiny):
    decoder, params = decoding_decoder(tiny.config), unstack(tiny.params, tiny.decoder)
    empty = init_caches(tiny.config, 4, 24)
    _, caches = prefill(decoder, params, empty, jnp.ones((4, 12), jnp.int32), LENGTHS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(empty))
    for leaf in jax.tree.leaves(caches):
        used = np.abs(np.asarray(leaf)).sum(axis=(1, 3)) > 0
        np.testing.assert_array_equal(used, np.arange(24) < LENGTHS[:, None])
