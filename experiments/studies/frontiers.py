"""What policies attain at a KL to the first one: frontiers of reward, and what studies compare along them."""

from collections.abc import Callable, Sequence

import numpy as np
from common import cell, changed, mean, say
from known_reward import Point, World

KLS = (0.5, 1.0, 2.0, 3.0)
"""Where frontiers are compared, nats."""
DENSE = tuple(np.linspace(0, 4, 33).tolist())
"""Where they are drawn."""
OTHER_WORLD = 1000
"""Seed of the world in which learning rates are chosen; it is not reported."""


def hull(points: Sequence[Point]) -> list[Point]:
    """The least concave curve over the points, least KL first.

    What lies on a line between two of them is attained by drawing one of the two policies for each answer: the reward
    is then the mean, and the KL at most the mean, since it is convex.
    """
    found: list[Point] = []
    for new in sorted(points):
        while len(found) > 1 and _below(found[-2], found[-1], new):
            found.pop()
        found.append(new)
    best = max(range(len(found)), key=lambda i: found[i].reward)
    return found[: best + 1]


def _below(a: Point, b: Point, c: Point) -> bool:
    """Whether the one in the middle lies below the line between the others."""
    return (b.reward - a.reward) * (c.kl - a.kl) <= (c.reward - a.reward) * (b.kl - a.kl)


def attained(points: Sequence[Point], kl: float) -> float:
    """The reward at most so far from the reference."""
    line = hull(points)
    return float(np.interp(kl, [one.kl for one in line], [one.reward for one in line]))


def frontier(own: World, found: Sequence[Point], kls: Sequence[float]) -> list[float]:
    """Reward at each KL, of points and the reference."""
    every = [own.at(own.params), *found]
    return [attained(every, kl) for kl in kls]


def best_rate(name: str, rates: Sequence[float], own: World, points: Callable[[float], list[Point]]) -> float:
    """By mean reward over KLS in a world; `points` of a rate."""
    if len(rates) == 1:
        return rates[0]
    scores = {rate: mean(frontier(own, points(rate), KLS)) for rate in rates}
    say(f"{name}: " + ", ".join(f"rate {rate:g} {score:.3f}" for rate, score in scores.items()))
    return max(scores, key=lambda rate: scores[rate])


def cells(each: Sequence[Sequence[float]], others: Sequence[Sequence[float]] | None) -> list[str]:
    """Rewards of seeds at KLS, and their differences to others' in the same worlds."""
    found = []
    for i in range(len(KLS)):
        found.append(cell([one[i] for one in each], 2))
        if others is not None:
            beside = [a[i] - b[i] for a, b in zip(each, others, strict=True)]
            found[-1] += f" {mean(beside):+.3f} {changed(beside)}"
    return found


HEAD = [f"reward at KL {kl:g}" for kl in KLS]
