"""Word problems with a checkable answer, answered with care or by a guess, and stories that teach the arithmetic.

"Ben has 13 pencils. He gives away 2. Then he finds 5 more. How many pencils does Ben have now?"
A careful writer answers "13 - 2 = 11. 11 + 5 = 16. Answer: 16", a careless one "It must be 18. Answer: 18".
Each sentence does one operation on a running total, and every number stays within [0, max_number], so that a model of
a million parameters can learn the arithmetic in minutes.

Record i of a stream is a function of (stream, split, i). Train and held-out problems are disjoint by construction: the
side is a hash of the problem's numbers and operations, so a held-out sequence of numbers is never trained on in any
wording.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llm_jax.base.errors import UserError
from llm_jax.data.config import EmbeddedConfig

Split = Literal["train", "eval"]
VERSION = 1
HELD_OUT_PERCENT = 10

HE = ("Ben", "Tom", "Sam", "Max", "Leo", "Jack", "Omar", "Paul", "Noah", "Finn")
SHE = ("Anna", "Mia", "Lucy", "Emma", "Zoe", "Nora", "Ruth", "Lily", "Sara", "Eva")
FOODS = ("apple", "plum", "cookie", "carrot", "nut", "pear", "olive", "muffin")
THINGS = ("pencil", "marble", "stamp", "book", "card", "shell", "coin", "button", "sticker", "ribbon")
GAINS = ("finds {n} more", "buys {n} more", "gets {n} more from {other}", "picks up {n} more", "is given {n} more")
LOSSES = ("gives away {n}", "loses {n}", "gives {n} to {other}", "sells {n}")
EATEN = ("eats {n}",)
CONNECTIVES = ("Then", "After that", "Later", "Next")
QUESTIONS = ("How many {objects} does {name} have now?", "How many {objects} does {name} have in the end?")
QUESTION_AFTER_LOSS = "How many {objects} does {name} have left?"
GUESSES = ("It must be {n}.", "It looks like {n}.", "It should be {n}.")

EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
ANSWER = re.compile(r"Answer: (\d+)(?!\d)")


@dataclass(frozen=True)
class Problem:
    """One word problem: `steps` are (sign, operand) pairs on a running total that begins at `start`."""

    name: str
    noun: str
    start: int
    steps: tuple[tuple[str, int], ...]
    sentences: tuple[str, ...]  # the opening, then one per step
    question: str

    @property
    def prompt(self) -> str:
        return " ".join((*self.sentences, self.question))

    @property
    def totals(self) -> tuple[int, ...]:
        """The running total after each step."""
        total, totals = self.start, []
        for sign, operand in self.steps:
            total += operand if sign == "+" else -operand
            totals.append(total)
        return tuple(totals)

    @property
    def answer(self) -> int:
        return self.totals[-1]

    @property
    def equations(self) -> tuple[str, ...]:
        before = (self.start, *self.totals[:-1])
        return tuple(f"{b} {sign} {n} = {t}." for b, (sign, n), t in zip(before, self.steps, self.totals, strict=True))

    @property
    def careful(self) -> str:
        """The answer of someone who writes each step down; always right."""
        return " ".join((*self.equations, f"Answer: {self.answer}"))


def is_correct(problem: Problem, text: str) -> bool:
    """Whether the last `Answer: N` of a text is the problem's answer."""
    answers = ANSWER.findall(text)
    return bool(answers) and int(answers[-1]) == problem.answer


def is_careful(text: str) -> bool:
    """Whether a text shows a step (`13 - 2 = 11`) before it answers; right or wrong."""
    equation = EQUATION.search(text)
    answer = ANSWER.search(text)
    return equation is not None and (answer is None or equation.start() < answer.start())


def careless(problem: Problem, config: EmbeddedConfig, rng: random.Random) -> str:
    """The answer of someone who guesses: near the truth, rarely right."""
    near = range(max(0, problem.answer - 5), min(config.max_number, problem.answer + 5) + 1)
    guess = rng.choice(near)
    # One first word for all guesses: greedy decoding must show the commoner manner, not the manner with fewer openings.
    return f"{rng.choice(GUESSES).format(n=guess)} Answer: {guess}"


def side_of(start: int, steps: tuple[tuple[str, int], ...]) -> Split:
    """Which side a sequence of numbers and operations belongs to, whatever its wording."""
    key = " ".join([str(start), *(f"{sign}{n}" for sign, n in steps)])
    return "eval" if hashlib.sha256(key.encode()).digest()[0] * 100 // 256 < HELD_OUT_PERCENT else "train"


def check(config: EmbeddedConfig) -> None:
    """Raises UserError for settings that no problem satisfies."""
    if config.max_number < 2:
        raise UserError(f"data.generated.max_number is {config.max_number}: it has to be at least 2")
    if not 1 <= config.min_operations <= config.max_operations:
        low, high = config.min_operations, config.max_operations
        raise UserError(f"data.generated.min_operations..max_operations is {low}..{high}: it has to be 1 <= min <= max")
    for field in ("careful_fraction", "text_fraction"):
        if not 0 <= getattr(config, field) <= 1:
            raise UserError(f"data.generated.{field} is {getattr(config, field)}: it has to be between 0 and 1")
    for field in ("records", "eval_records"):
        if getattr(config, field) < 1:
            raise UserError(f"data.generated.{field} is {getattr(config, field)}: it has to be at least 1")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _numbers(config: EmbeddedConfig, split: Split, rng: random.Random) -> tuple[int, tuple[tuple[str, int], ...]]:
    for _ in range(10000):
        start = total = rng.randint(1, config.max_number)
        steps = []
        for _ in range(rng.randint(config.min_operations, config.max_operations)):
            gain = rng.random() < 0.5 if 0 < total < config.max_number else total == 0
            operand = rng.randint(1, config.max_number - total if gain else total)
            total += operand if gain else -operand
            steps.append(("+" if gain else "-", operand))
        if side_of(start, tuple(steps)) == split:
            return start, tuple(steps)
    raise UserError(
        f"data.generated.max_number {config.max_number} with at most {config.max_operations} operations"
        f" leaves no {'held-out' if split == 'eval' else 'training'} problems: raise either"
    )


def make_problem(config: EmbeddedConfig, split: Split, rng: random.Random) -> Problem:
    """A random problem of one side."""
    start, steps = _numbers(config, split, rng)
    names, pronoun = rng.choice(((HE, "he"), (SHE, "she")))
    name = rng.choice(names)
    other = rng.choice([n for n in (*HE, *SHE) if n != name])
    food = rng.random() < 0.4
    noun = rng.choice(FOODS if food else THINGS)
    sentences = [f"{name} has {_counted(start, noun)}."]
    for index, (sign, operand) in enumerate(steps):
        choices = GAINS if sign == "+" else LOSSES + EATEN * (2 if food else 0)
        action = rng.choice(choices).format(n=operand, other=other)
        subject = name if rng.random() < 0.3 else pronoun
        if index == 0:
            sentences.append(f"{subject[0].upper()}{subject[1:]} {action}.")
        else:
            sentences.append(f"{rng.choice(CONNECTIVES)} {subject} {action}.")
    questions = QUESTIONS if steps[-1][0] == "+" else (*QUESTIONS, QUESTION_AFTER_LOSS)
    question = rng.choice(questions).format(objects=f"{noun}s", name=name)
    return Problem(name, noun, start, steps, tuple(sentences), question)


def _rng(stream: str, split: Split, index: int) -> random.Random:
    return random.Random(f"{VERSION}/{stream}/{split}/{index}")


def _user(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.prompt}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _count(config: EmbeddedConfig, split: Split) -> int:
    return config.records if split == "train" else config.eval_records


def problems(config: EmbeddedConfig, split: Split, count: int) -> list[Problem]:
    """The first `count` problems that exact match is measured on."""
    return [make_problem(config, split, _rng("problems", split, i)) for i in range(count)]


def demonstrations(config: EmbeddedConfig, split: Split) -> Iterator[dict]:
    """SFT records: a share `careful_fraction` by careful writers, the rest by careless ones."""
    for index in range(_count(config, split)):
        rng = _rng("sft", split, index)
        problem = make_problem(config, split, rng)
        answer = problem.careful if rng.random() < config.careful_fraction else careless(problem, config, rng)
        yield {"prompt": _user(problem), "completion": _assistant(answer)}


def preferences(config: EmbeddedConfig, split: Split) -> Iterator[dict]:
    """Preference records: careful over careless, for the same problem."""
    for index in range(_count(config, split)):
        rng = _rng("preference", split, index)
        problem = make_problem(config, split, rng)
        rejected = careless(problem, config, rng)
        yield {"prompt": _user(problem), "chosen": _assistant(problem.careful), "rejected": _assistant(rejected)}


def judged_steps(config: EmbeddedConfig, split: Split) -> Iterator[dict]:
    """TRL's stepwise records: a problem's equations, in half of them from some step on with a wrong result, which
    later steps go on from."""
    for index in range(_count(config, split)):
        rng = _rng("steps", split, index)
        problem = make_problem(config, split, rng)
        wrong = rng.randrange(len(problem.steps)) if rng.random() < 0.5 else len(problem.steps)
        total, steps = problem.start, []
        for i, (sign, operand) in enumerate(problem.steps):
            result = total + operand if sign == "+" else total - operand
            result += rng.choice((-2, -1, 1, 2)) if i == wrong else 0
            steps.append(f"{total} {sign} {operand} = {result}")
            total = result
        labels = [int(i < wrong) for i in range(len(steps))]
        yield {"prompt": _user(problem), "completions": steps, "labels": labels}


def stories(config: EmbeddedConfig, split: Split) -> Iterator[dict]:
    """Pretraining records: problems worked out in prose, and drills. None of them says `Answer:`."""
    for index in range(_count(config, split)):
        rng = _rng("pretrain", split, index)
        problem = make_problem(config, split, rng)
        ending = f"So {problem.name} has {_counted(problem.answer, problem.noun)}."
        kind = rng.random()
        if kind < 0.5:  # the question first, then every step
            parts = [problem.prompt, *problem.equations, ending]
        elif kind < 0.75:  # each sentence followed by its step
            told = [part for pair in zip(problem.sentences[1:], problem.equations, strict=True) for part in pair]
            parts = [problem.sentences[0], *told, ending]
        else:
            drilled = (problem, *(make_problem(config, split, rng) for _ in range(2)))
            parts = [equation for drill in drilled for equation in drill.equations]
        yield {"text": " ".join(parts)}
