"""Sets of cases in which every two values of two options meet."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def covering(options: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Cases of one value per option, taken greedily until each pair of values that can be in a case is in one."""
    cases = [case for case in everything(options) if allowed(case)]
    bits: dict[Any, int] = {}
    pairs = []  # of each case, a bit per pair
    for case in cases:
        both = itertools.combinations([(k, repr(v)) for k, v in case.items()], 2)
        pairs.append(sum(1 << bits.setdefault(pair, len(bits)) for pair in both))
    missing = (1 << len(bits)) - 1
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: (pairs[i] & missing).bit_count())
        missing &= ~pairs[best]
        chosen.append(cases[best])
    return chosen


def everything(options: Mapping[str, Sequence[Any]]) -> list[Case]:
    """The full product."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
