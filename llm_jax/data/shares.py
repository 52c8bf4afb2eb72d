"""Which source of a mixture each row of the stream is from: exact shares at every prefix, by arithmetic on its number.

The sources are the leaves of a binary tree, built as Huffman (1952) builds his: the two lightest are joined, again and
again. At a joint of weights a and b the first n rows are dealt out as round(n a / (a + b)) to the one side and the rest
to the other, and a row's number among those of its side is what the next joint deals out. So every prefix of n rows
holds n times the source's share, within less than two rows; where row i comes from depends on i and the weights only.
"""

import heapq
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from llm_jax.base.errors import UserError
from llm_jax.data.config import SourceConfig

NAME = re.compile(r"[A-Za-z0-9_.-]+")


class _Joint(NamedTuple):
    """`left` gets `part` of every `whole` rows that come here, `right` the others."""

    part: int
    whole: int
    left: "_Joint | int"
    right: "_Joint | int"

    def dealt(self, rows: int) -> int:
        """How many of the first rows go left: exact, rounded half up."""
        return (2 * rows * self.part + self.whole) // (2 * self.whole)


class Shares:
    """Args: weights, each positive; as written in decimal they are taken exactly (0.1 is a tenth)."""

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(repr(weight)) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        heap: list[tuple[Fraction, int, _Joint | int]] = [(w, n, n) for n, w in enumerate(self.shares)]
        heapq.heapify(heap)
        while len(heap) > 1:
            lighter, heavier = heapq.heappop(heap), heapq.heappop(heap)
            ratio = heavier[0] / (lighter[0] + heavier[0])
            joint = _Joint(ratio.numerator, ratio.denominator, heavier[2], lighter[2])
            heapq.heappush(heap, (lighter[0] + heavier[0], len(weights) + heavier[1], joint))
        self._root = heap[0][2]

    def at(self, row: int) -> tuple[int, int]:
        """The source of row number `row` of the stream, and which of that source's rows it is, from 0."""
        node = self._root
        while isinstance(node, _Joint):
            before = node.dealt(row)
            node, row = (node.left, before) if node.dealt(row + 1) > before else (node.right, row - before)
        return node, row


def source_names(mixture: Sequence[SourceConfig]) -> list[str]:
    """Each source's name: given, or the last part of its path without endings."""
    return [source.name or re.split("[/:]", source.path.rstrip("/"))[-1].split(".", 1)[0] for source in mixture]


def check_mixture(mixture: Sequence[SourceConfig]) -> None:
    """Raises UserError for a weight that is not positive, and for names that are alike or no part of a metric's."""
    names = source_names(mixture)
    for number, (source, name) in enumerate(zip(mixture, names, strict=True)):
        where = f"data.mixture[{number}]"
        if not source.weight > 0:
            raise UserError(f"{where}.weight is {source.weight}: it has to be above 0")
        if not NAME.fullmatch(name):
            raise UserError(f"{where}.name={name!r}: a name has letters, digits and any of _ . -")
        if name in names[:number]:
            raise UserError(f"{where}: two sources are called {name}; give them different names")
