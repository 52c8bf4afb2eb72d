"""The transformed distribution: transformers' processors as the outside number, definitions where they have none."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.inference.config import SamplingParams
from llm_jax.inference.logits import row_params, transform_logits
from tests.oracles.recipe import draw, draw_tokens

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "logits_processors.json").read_text())


def golden_case(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32[V] and seen bool[V] of a case of the golden file."""
    logits = 3.0 * draw(f"logits.{number}.embed", (1, GOLDEN["vocab"]), GOLDEN["seed"])[0]
    seen = np.zeros(GOLDEN["vocab"], bool)
    seen[draw_tokens(f"seen.{number}", (1, GOLDEN["seen"]), GOLDEN["vocab"], GOLDEN["seed"])[0]] = True
    return logits, seen


def test_equals_transformers():
    """All cases as rows of one batch, so that neighbours with other parameters are shown to change nothing."""
    cases = [golden_case(number) for number in range(len(GOLDEN["cases"]))]
    rows = row_params([SamplingParams(**case["params"]) for case in GOLDEN["cases"]])
    logits, seen = (jnp.asarray(np.stack(part)) for part in zip(*cases))
    probs = np.asarray(jax.nn.softmax(jax.jit(transform_logits)(logits, rows, seen), axis=-1))
    expected = np.asarray([case["probs"] for case in GOLDEN["cases"]])
    np.testing.assert_array_equal(probs == 0, expected == 0)
    np.testing.assert_allclose(probs, expected, rtol=2e-6, atol=1e-7)


def test_temperature_comes_before_top_p():
    """serving.md: logits [2, 1, 0] at T=0.5 and top_p=0.85 leave one token; filtering first would leave two."""
    out = transform_logits(jnp.asarray([[2.0, 1.0, 0.0]]), row_params([SamplingParams(temperature=0.5, top_p=0.85)]))
    np.testing.assert_array_equal(np.isfinite(out), [[True, False, False]])


def test_min_p_compares_probabilities():
    """Logits [3, 2, 1, .5] with min_p .5 leave [1, 0, 0, 0] (a peer that compares logits leaves four)."""
    out = transform_logits(jnp.asarray([[3.0, 2.0, 1.0, 0.5]]), row_params([SamplingParams(min_p=0.5)]))
    np.testing.assert_array_equal(np.isfinite(out), [[True, False, False, False]])


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.4, "min_p": 0.2}])
def test_greedy_is_one_hot(params):
    logits = jnp.asarray([[0.5, 2.0, 2.0, -1.0], [5.0, 1.0, 0.0, 4.0]])
    seen = jnp.asarray([[False] * 4, [True, False, False, False]])
    rows = row_params([SamplingParams(temperature=0.0, repetition_penalty=2.0, **params)] * 2)
    probs = jax.nn.softmax(transform_logits(logits, rows, seen), axis=-1)
    np.testing.assert_array_equal(probs, [[0, 1, 0, 0], [0, 0, 0, 1]])


def test_tiny_temperature_and_large_logits_stay_finite():
    logits = jnp.asarray([[1e30, 3e30, 2.9e30], [-1e4, 1e4, 9e3]])
    rows = row_params([SamplingParams(temperature=1e-30, top_p=0.9, top_k=2, min_p=0.1)] * 2)
    probs = jax.nn.softmax(transform_logits(logits, rows), axis=-1)
    np.testing.assert_array_equal(probs, [[0, 1, 0], [0, 1, 0]])


def test_ties_are_kept_together():
    logits = jnp.log(jnp.asarray([[0.1, 0.3, 0.3, 0.3]]))
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        out = transform_logits(logits, row_params([params]))
        np.testing.assert_array_equal(np.isfinite(out), [[False, True, True, True]])


def test_no_filter_changes_nothing_but_a_constant():
    logits = jnp.asarray(draw("plain.embed", (4, 4096), 5))
    mixed = [
        SamplingParams(),
        SamplingParams(top_k=0, top_p=1.0),
        SamplingParams(top_k=4096),
        SamplingParams(top_p=0.5),
    ]
    plain = transform_logits(logits, row_params([SamplingParams()] * 4))
    np.testing.assert_array_equal(transform_logits(logits, row_params(mixed))[:3], plain[:3])
    np.testing.assert_allclose(plain, logits - logits.max(-1, keepdims=True), rtol=1e-6)
