"""Few combinations of many options, in which every two values of two options meet."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations that hold every pair of values of every two options; greedy, so not the fewest.

    Each is begun with the first pair that is missing and completed, option by option, with the value that adds most.
    """
    names = list(options)
    missing = {
        ((a, x), (b, y))
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)
        for x, y in itertools.product(range(len(options[a])), range(len(options[b])))
    }
    combinations = []
    while missing:
        chosen = dict(min(missing, key=lambda pair: [(names.index(name), value) for name, value in pair]))
        for name in sorted(set(names) - set(chosen), key=lambda name: (-len(options[name]), names.index(name))):
            gains = [len(missing & _pairs(names, chosen | {name: value})) for value in range(len(options[name]))]
            chosen[name] = gains.index(max(gains))
        missing -= _pairs(names, chosen)
        combinations.append({name: options[name][chosen[name]] for name in names})
    return combinations


def _pairs(names: Sequence[str], chosen: Mapping[str, int]) -> set[tuple]:
    return set(itertools.combinations([(name, chosen[name]) for name in names if name in chosen], 2))
