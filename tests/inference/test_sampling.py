"""Frequencies of sampled tokens by chi-square, and what the random numbers depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llm_jax.inference.config import SamplingParams
from llm_jax.inference.logits import row_params, transform_logits
from llm_jax.inference.sampling import request_keys, sample, seed_words
from tests.inference.test_logits import GOLDEN, golden_case

DRAWS = 20_000


def chi_square(tokens: np.ndarray, probs: np.ndarray) -> float:
    """p-value of the counts under `probs`; a token of probability 0 must not occur at all."""
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    likely = probs * len(tokens) >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(probs[likely], probs[~likely].sum()) * len(tokens)
    if expected[-1] < 5:  # too few for a cell of their own: joined to the smallest cell
        smallest = np.argmin(expected[:-1])
        observed[smallest] += observed[-1]
        expected[smallest] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    if len(observed) == 1:
        return 1.0
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_frequencies_equal_the_peers_distribution(number):
    """Many requests at one position against the probabilities that transformers' processors give."""
    logits, seen = golden_case(number)
    case = GOLDEN["cases"][number]
    rows = row_params([SamplingParams(**case["params"])] * DRAWS)
    keys = request_keys(seed_words(range(DRAWS)), jnp.zeros(DRAWS, jnp.int32))
    tokens, _ = sample(
        jnp.tile(logits, (DRAWS, 1)), keys, jnp.full(DRAWS, 7), rows, jnp.tile(jnp.asarray(seen), (DRAWS, 1))
    )
    assert chi_square(np.asarray(tokens), np.asarray(case["probs"])) > 1e-3


@pytest.mark.parametrize("axis", ["positions", "samples"])
def test_frequencies_along_positions_and_samples(axis):
    logits, _ = golden_case(0)
    rows = row_params([SamplingParams(temperature=1.3, top_k=8, top_p=0.95)] * DRAWS)
    along = jnp.arange(DRAWS)
    fixed = jnp.zeros(DRAWS, jnp.int32)
    keys = request_keys(seed_words([11] * DRAWS), along if axis == "samples" else fixed)
    tokens, logprobs = sample(jnp.tile(logits, (DRAWS, 1)), keys, along if axis == "positions" else fixed, rows)
    probs = jax.nn.softmax(transform_logits(jnp.asarray(logits)[None], rows_of(rows, 1))[0])
    tokens = np.asarray(tokens)
    assert chi_square(tokens, np.asarray(probs, np.float64)) > 1e-3
    pairs = tokens[:-1:2] * len(probs) + tokens[1::2]
    assert chi_square(pairs, np.outer(probs, probs).astype(np.float64).ravel()) > 1e-3
    np.testing.assert_allclose(logprobs, np.asarray(jax.nn.log_softmax(logits))[tokens], rtol=1e-5, atol=1e-6)


def rows_of(rows, n):
    return jax.tree.map(lambda x: x[:n], rows)


def test_draw_is_gumbel_max_with_the_documented_key():
    """Token = argmax(logits + gumbel(fold_in(key(seed), position))), recomputed with jax.random alone."""
    logits, _ = golden_case(2)
    seeds, positions = [0, 5, 2**32 - 1], [3, 0, 900]
    keys = request_keys(seed_words(seeds), jnp.zeros(3, jnp.int32))
    tokens, _ = sample(jnp.tile(logits, (3, 1)), keys, jnp.asarray(positions), row_params([SamplingParams()] * 3))
    for token, seed, position in zip(tokens, seeds, positions):
        key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray([0, seed], jnp.uint32)), position)
        assert token == jnp.argmax(logits + jax.random.gumbel(key, logits.shape))
    small = request_keys(seed_words([5]), jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(jax.random.key_data(small[0]), jax.random.key_data(jax.random.key(5)))


def test_a_row_draws_the_same_in_any_batch():
    logits = jnp.stack([jnp.asarray(golden_case(i)[0]) for i in range(8)])
    params = [SamplingParams(temperature=0.0 if i % 3 == 0 else 1.5, top_k=i, seed=i) for i in range(8)]
    keys = request_keys(seed_words([p.seed for p in params]), jnp.arange(8))
    positions = jnp.arange(8) * 3
    together, _ = sample(logits, keys, positions, row_params(params))
    order = [6, 1, 3]
    at = np.asarray(order)
    some, _ = sample(logits[at], keys[at], positions[at], row_params([params[i] for i in order]))
    np.testing.assert_array_equal(some, together[at])


def test_seeds_and_samples_give_distinct_keys():
    words = seed_words([0, 1, 2**32, 2**64 - 1])
    assert words.tolist() == [[0, 0], [0, 1], [1, 0], [0xFFFFFFFF, 0xFFFFFFFF]]
    keys = request_keys(np.repeat(words, 4, axis=0), jnp.tile(jnp.arange(4), 4))
    assert len(np.unique(np.asarray(jax.random.key_data(keys)), axis=0)) == 16
