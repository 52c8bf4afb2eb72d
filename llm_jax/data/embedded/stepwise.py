"""Word problems step by step: the next right step over a wrong one.

The solution of "Ben has 13 pencils. He gives away 2. Then he finds 5 more. ..." has three steps, "13 - 2 = 11.",
" 11 + 5 = 16." and " Answer: 16" (`data.steps` has how a text is split). A wrong step has another result, computes with
the other sign, or goes on from another total; every one of them can be told by its equation.
"""

import random
from collections.abc import Iterator, Sequence

from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded.problems import ANSWER, EQUATION, Problem, Split, make_problem

VERSION = 1


def right_steps(problem: Problem) -> list[str]:
    """The careful solution's steps; joined they are `problem.careful`."""
    return [problem.equations[0], *(f" {e}" for e in problem.equations[1:]), f" Answer: {problem.answer}"]


def first_wrong_step(problem: Problem, steps: Sequence[str]) -> int | None:
    """The first step that the careful solution does not have at its place: another equation, none, or another answer.

    An answer that is right without the equations before it is no wrong step. None where no step is wrong, which
    includes a solution that stops too early.
    """
    before = (problem.start, *problem.totals[:-1])
    wanted = [(b, sign, n, t) for b, (sign, n), t in zip(before, problem.steps, problem.totals, strict=True)]
    for number, step in enumerate(steps):
        answer, equations = ANSWER.search(step), EQUATION.findall(step)
        if answer is not None and not equations:
            if int(answer[1]) != problem.answer:
                return number
            continue
        read = [(int(b), sign, int(n), int(t)) for b, sign, n, t in equations]
        if number >= len(wanted) or read != [wanted[number]]:
            return number
    return None


def wrong_step(problem: Problem, number: int, config: EmbeddedConfig, rng: random.Random) -> str:
    """A step that differs from the right one at this place in what it says: see the module."""
    space = " " if number else ""
    if number == len(problem.steps):
        others = [n for n in (*problem.totals[:-1], problem.answer - 1, problem.answer + 1) if n >= 0]
        return f" Answer: {rng.choice([n for n in others if n != problem.answer])}"
    sign, operand = problem.steps[number]
    totals = (problem.start, *problem.totals)
    before, after = totals[number], totals[number + 1]
    other = "-" if sign == "+" else "+"
    choices = [(before, sign, after + d) for d in (-2, -1, 1, 2)]
    choices += [(before, other, _computed(before, other, operand))] * 2
    choices += [(t, sign, _computed(t, sign, operand)) for t in (before - 1, before + 1)]
    possible = [c for c in choices if c[0] >= 0 and 0 <= c[2] <= config.max_number] or [(before, sign, after + 1)]
    start, sign, result = rng.choice(possible)
    return f"{space}{start} {sign} {operand} = {result}."


def preferences(config: EmbeddedConfig, split: Split) -> Iterator[dict]:
    """Records of one step each, any step of a problem: right steps before it, the right one, a wrong one."""
    for index in range(config.records if split == "train" else config.eval_records):
        rng = _rng("steps", split, index)
        problem = make_problem(config, split, rng)
        steps = right_steps(problem)
        number = rng.randrange(len(steps))
        last = number == len(steps) - 1
        yield {
            "prompt": [{"role": "user", "content": problem.prompt}],
            "prefix": "".join(steps[:number]),
            "chosen": steps[number],
            "rejected": wrong_step(problem, number, config, rng),
            "chosen_ends": last,
            "rejected_ends": last,
        }


def _computed(start: int, sign: str, operand: int) -> int:
    return start + operand if sign == "+" else start - operand


def _rng(stream: str, split: Split, index: int) -> random.Random:
    return random.Random(f"{VERSION}/{stream}/{split}/{index}")
