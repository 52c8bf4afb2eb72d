"""Pairs from scores: small cases by hand, SPO's and SPPO's numbers by loops, and what self-play finds where
Bradley-Terry can't."""

import math

import numpy as np
import pytest

from llm_jax.jobs.alignment.choice import (
    above_over_below,
    best_over_worst,
    every_pair,
    some_of,
    spo_rewards,
    sppo_win_rates,
    win_probabilities,
)

SCORES = np.array([0.0, 1.0, 1.0, 0.0, 0.5])


def test_pairs_of_five_scores():
    assert best_over_worst(SCORES) == [(1, 0)]
    assert best_over_worst(np.array([2.0, 2.0])) == []
    assert above_over_below(SCORES, 1.0, 0.0) == [(1, 0), (1, 3), (2, 0), (2, 3)]
    assert above_over_below(SCORES, 1.5, 0.0) == []
    assert every_pair(SCORES) == [(1, 0), (1, 3), (1, 4), (2, 0), (2, 3), (2, 4), (4, 0), (4, 3)]


def test_some_pairs_are_drawn_by_seed_and_stay_in_order():
    pairs = every_pair(SCORES)
    drawn = {tuple(some_of(pairs, 3, seed)) for seed in range(40)}
    assert len(drawn) > 10 and all(len(few) == 3 and sorted(few) == list(few) for few in drawn)
    assert some_of(pairs, None, 0) == some_of(pairs, 8, 0) == pairs
    assert some_of(pairs, 3, 7) == some_of(pairs, 3, 7)


def test_probabilities_to_win():
    scores = [0.3, -1.2, 900.0]
    wins = win_probabilities(np.array(scores), "sigmoid")
    for i, a in enumerate(scores):
        for j, b in enumerate(scores):
            difference = a - b
            exact = 1 / (1 + math.exp(-difference)) if difference > -700 else 0.0
            assert wins[i, j] == pytest.approx(exact, abs=1e-15)
    np.testing.assert_allclose(wins + wins.T, 1.0, atol=1e-15)
    assert win_probabilities(np.array([1.0, 0.0, 1.0]), "compare").tolist() == [
        [0.5, 1, 0.5],
        [0, 0.5, 0],
        [0.5, 1, 0.5],
    ]


def test_rewards_of_self_play_leave_oneself_out_and_win_rates_do_not():
    chance = np.random.default_rng(0)
    upper = np.triu(chance.uniform(size=(5, 5)), 1)
    wins = upper + np.tril(1 - upper.T, -1) + np.eye(5) / 2
    for i in range(5):
        others = [wins[i, j] for j in range(5) if j != i]
        assert spo_rewards(wins)[i] == pytest.approx(sum(others) / 4, abs=1e-15)
        assert sppo_win_rates(wins)[i] == pytest.approx((sum(others) + 0.5) / 5, abs=1e-15)


# A beats B nearly always, B beats C and C beats A somewhat more often than not: no ranking says that.
CYCLE = np.array([[0.5, 0.9, 0.4], [0.1, 0.5, 0.6], [0.6, 0.4, 0.5]])
# Of a cycle with margins x (A over B), y (B over C), z (C over A) the mixture that nothing beats is (y, z, x) / sum.
MIXTURE = np.array([0.1, 0.1, 0.4]) / 0.6


def exploited(policy: np.ndarray) -> float:
    """By how much more than 1/2 the best answer to a policy beats it."""
    return float((CYCLE @ policy).max() - 0.5)


def test_self_play_finds_the_mixture_of_a_cycle():
    """SPO's algorithm: rewards of samples against each other, and a step that has no regret (here: Hedge)."""
    chance, logits, mean, rounds, rate, k = np.random.default_rng(0), np.zeros(3), np.zeros(3), 6000, 0.05, 32
    for _ in range(rounds):
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        mean += policy / rounds
        # One sample of each kind among them, so that each has a reward.
        drawn = np.concatenate([np.arange(3), chance.choice(3, size=k, p=policy)])
        others = spo_rewards(CYCLE[np.ix_(drawn, drawn)])[:3] * (len(drawn) - 1)
        # Without the three that were put there.
        put = CYCLE.sum(axis=1) - 0.5
        logits += rate * (others - put) / k
    np.testing.assert_allclose(mean, MIXTURE, atol=0.02)
    assert exploited(MIXTURE) == pytest.approx(0.0, abs=1e-12)
    assert exploited(mean) < 0.005


def test_bradley_terry_does_not():
    """The scores that fit the same preferences best, all pairs asked equally often; then softmax(score / beta), the
    optimum of reward less beta KL from a uniform start, for any beta."""
    scores = np.zeros(3)
    for _ in range(4000):
        fitted = win_probabilities(scores, "sigmoid")
        scores += 0.5 * (CYCLE - fitted).sum(axis=1)
    assert np.abs((CYCLE - win_probabilities(scores, "sigmoid")).sum(axis=1)).max() < 1e-9
    losses = []
    for beta in np.geomspace(1e-3, 1e3, 61):
        policy = np.exp((scores - scores.max()) / beta)
        losses.append(exploited(policy / policy.sum()))
    assert scores.argmax() == 0 and min(losses) > 0.04
