"""Which of the answers to one prompt make pairs: pure functions of scores and of probabilities to win.

Scores are float[k], one for each of k answers. `wins` is float[k, k] with wins[i, j] = P(y_i > y_j), so that
wins[i, j] + wins[j, i] = 1 and wins[i, i] = 1/2. A pair is (index of the chosen, index of the rejected).
"""

import random
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Pair = tuple[int, int]


def best_over_worst(scores: Float[np.ndarray, "k"]) -> list[Pair]:
    """The highest over the lowest score, of equals the first (Online-RLHF's `max_min`); none where all are equal."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return [(best, worst)] if scores[best] > scores[worst] else []


def above_over_below(scores: Float[np.ndarray, "k"], above: float, below: float) -> list[Pair]:
    """Every answer of at least `above` over every one of at most `below`, which is less (iterative RPO's winners and
    losers: 1 and 0 of a checker)."""
    return [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a >= above and b <= below]


def every_pair(scores: Float[np.ndarray, "k"]) -> list[Pair]:
    """Every answer over every other of a lower score."""
    return [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]


def some_of(pairs: Sequence[Pair], most: int | None, seed: int) -> list[Pair]:
    """At most so many, drawn without replacement, in their order."""
    if most is None or len(pairs) <= most:
        return list(pairs)
    kept = sorted(random.Random(seed).sample(range(len(pairs)), most))
    return [pairs[i] for i in kept]


def win_probabilities(scores: Float[np.ndarray, "k"], how: str) -> Float[np.ndarray, "k k"]:
    """P(y_i > y_j) from scores: `sigmoid` of their difference (Bradley and Terry), or `compare`: 1, 1/2 or 0."""
    difference = np.asarray(scores, np.float64)[:, None] - np.asarray(scores, np.float64)[None, :]
    if how == "compare":
        return (np.sign(difference) + 1) / 2
    positive = 1 / (1 + np.exp(-np.abs(difference)))
    return np.where(difference >= 0, positive, 1 - positive)


def spo_rewards(wins: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k"]:
    """r_i = mean over j != i of P(y_i > y_j): SPO (Swamy et al. 2024, arXiv:2401.04056, algorithm 2)."""
    k = len(wins)
    return (wins.sum(axis=1) - np.diagonal(wins)) / (k - 1)


def sppo_win_rates(wins: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k"]:
    """P(y_i > pi) estimated by the mean over all k samples of pi, y_i itself with 1/2 among them: SPPO (Wu et al. 2024,
    arXiv:2405.00675, eq. 4.4 and the authors' code, which takes the sigmoid of PairRM's differences)."""
    return wins.mean(axis=1)
