"""Answers to word problems that are longer or shorter for no reason, and pairs of them.

A careful writer ("Carefully.") computes rightly, a quick one ("Quickly.") guesses every result. Both throw in remarks
that say nothing: behind the opening and behind each equation another one each time with some probability. Nothing but
remarks makes one answer to a problem longer than another.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from llm_jax.data.embedded.problems import Problem
from llm_jax.data.examples import Pair

LARGEST, OPERATIONS = 12, 2
"""Of the problems."""
GOES_ON = 1 / 3
"""With which probability writers remark something more, before anybody has a preference."""
AGREED = 0.8
"""Share of pairs whose careful answer is the chosen one."""


@dataclass(frozen=True)
class Remarks:
    phrases: tuple[str, ...]
    """As likely as each other, and of as many tokens."""
    most: int
    """In one answer."""

    def numbers(self, goes_on: float, chance: random.Random) -> tuple[int, ...]:
        """How many stand behind the opening and behind each equation."""

        def one() -> int:
            count = 0
            while chance.random() < goes_on:
                count += 1
            return count

        while sum(found := tuple(one() for _ in range(OPERATIONS + 1))) > self.most:
            pass
        return found

    def answer(self, problem: Problem, careful: bool, counts: Sequence[int], chance: random.Random) -> str:
        """Of a careful or a quick writer, with so many remarks."""
        total, parts = problem.start, ["Carefully." if careful else "Quickly."]
        parts += self._some(counts[0], chance)
        for (sign, operand), right, count in zip(problem.steps, problem.totals, counts[1:], strict=True):
            # A guess has as many digits.
            guesses = [n for n in range(LARGEST + 1) if len(str(n)) == len(str(right))]
            result = right if careful else chance.choice(guesses)
            parts += [f"{total} {sign} {operand} = {result}.", *self._some(count, chance)]
            total = result
        return " ".join((*parts, f"Answer: {total}"))

    def _some(self, count: int, chance: random.Random) -> list[str]:
        return [chance.choice(self.phrases) for _ in range(count)]

    def demonstration(self, problem: Problem, chance: random.Random) -> str:
        """By either writer."""
        return self.answer(problem, chance.random() < 0.5, self.numbers(GOES_ON, chance), chance)

    def preferences(self, shown: Sequence[Problem], goes_on: tuple[float, float]) -> list[Pair]:
        """A careful and a quick answer to each problem.

        Args:
          goes_on: of the chosen and of the rejected answer. Where both are the same, every second pair has the numbers
            of remarks of the one before it, the other way round, so that no chance favours a length.
        """
        chance, pairs = random.Random("pairs"), []
        both: tuple[tuple[int, ...], ...] = ()
        for number, problem in enumerate(shown):
            agreed = chance.random() < AGREED
            turned = goes_on[0] == goes_on[1] and number % 2
            both = both[::-1] if turned else tuple(self.numbers(each, chance) for each in goes_on)
            chosen, rejected = (
                self.answer(problem, careful, counts, chance)
                for careful, counts in zip((agreed, not agreed), both, strict=True)
            )
            pairs.append(Pair(problem.prompt + "\n", chosen, rejected))
        return pairs

    def count(self, text: str) -> int:
        return sum(text.count(phrase) for phrase in self.phrases)
