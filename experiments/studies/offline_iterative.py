"""Offline against iterative preference training, at equal numbers of pairs and steps, with the same loss.

    python experiments/studies/offline_iterative.py [--seeds 3] [--steps 64] [--rates 1e-4 3e-4 1e-3]

Pairs are a right over a wrong answer out of four samples to a word problem. Each arm trains on as many pairs, for as
many steps, with one optimizer from beginning to end; two things differ:

- where pairs are from: all drawn from the first policy (offline), or dealt out over 2 or 4 rounds, each drawn from the
  policy as it then is (iterative);
- the reference: the first policy all along, or the policy of each round's start, as iterative DPO has it (Dong et al.
  2024, arXiv:2405.07863; Xu et al. 2023, arXiv:2312.16682). A reference that moves gives back what distance from the
  start has cost, whatever the pairs.

So each is tried without the other, under DPO and under RPO (DPO with the chosen answer's likelihood; Pang et al. 2024,
arXiv:2404.19733). Every seed has a first policy of its own, the same for all arms. An arm's rate is the one with the
highest exact match, mean over the seeds, on other problems than those reported.

Prints a Markdown table: samples drawn to get the pairs, exact match, and its difference to the start and to offline
training with the same loss, with the 95% interval of a bootstrap over problems. The plot has exact match by pairs used.
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Rows, cell, make_parser, mean, say, table
from loops import difference
from plot import lines
from small_policies import Aligner, Answers, Ground, Params, Size, asked, problems

from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded.problems import Problem, is_correct
from llm_jax.data.formats import Pair
from llm_jax.jobs.alignment.choice import best_over_worst
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.preference_loss import preference_loss

QUARTERS, SAMPLES = 4, 4
LOSSES = {
    "DPO": PreferenceConfig(loss_type="sigmoid", beta=0.1),
    "RPO": PreferenceConfig(loss_type="rpo", beta=0.1),
}


@dataclass(frozen=True)
class Arm:
    rounds: int
    """Draws of pairs."""
    references: int = 1
    """How often the reference is set to the policy, the start among them."""


OFFLINE = "offline"
ARMS = {
    OFFLINE: Arm(rounds=1),
    "offline, the reference moves": Arm(rounds=1, references=4),
    "4 rounds, the reference stays": Arm(rounds=4),
    "2 rounds": Arm(rounds=2, references=2),
    "4 rounds": Arm(rounds=4, references=4),
}


@dataclass(frozen=True)
class Outcome:
    samples: int
    """Drawn to get all pairs."""
    choosing: float
    """Exact match on the problems by which a rate is chosen."""
    looks: list[float]
    """Exact match on the reported problems after each quarter of the pairs."""
    correct: np.ndarray
    """bool[problems], at the end."""


class Study:
    def __init__(self, options: argparse.Namespace):
        small = options.scale == "test"
        self.options, self.cut_off = options, small
        config = EmbeddedConfig(max_number=12, min_operations=2, max_operations=3)
        size = Size(width=32, layers=1, demonstrations=500, steps=4) if small else Size()
        self.ground = Ground(config, lambda problem, chance: problem.careful, size)
        self.pairs = 16 if small else options.pairs
        self.asked = problems(config, "train", 64 if small else 6 * self.pairs)
        counts = (4, 4) if small else (400, 600)
        self.choosing, self.reported = (
            problems(config, name, count, "eval") for name, count in zip(("choosing", "reported"), counts, strict=True)
        )
        self.starts = [self.ground.start(seed) for seed in range(options.seeds)]
        self.answers = Answers(self.ground, self.starts[0], max_tokens=8 if small else 48)
        # All arms have their first pairs from the same policy.
        self.first = functools.cache(lambda seed, count: self.draw(self.starts[seed], count, 0, seed))

    def scores(self, problem: Problem, texts: list[str]) -> np.ndarray:
        """1 for a right answer. At test size nothing is right, and the shorter answer is preferred."""
        if self.options.scale == "test":
            return np.array([-len(text) for text in texts])
        return np.array([is_correct(problem, text) for text in texts], float)

    def draw(self, params: Params, count: int, at: int, seed: int) -> tuple[list[Pair], int, int]:
        """So many pairs of problems from place `at` on; the place after the last of them; samples drawn."""
        pairs, drawn = [], 0
        while len(pairs) < count:
            chunk = self.asked[at : at + 64]
            if not chunk:
                raise SystemExit(f"{count} pairs wanted, {len(pairs)} found: the problems have come to their end")
            found = self.answers(params, chunk, n=SAMPLES, seed=1000 * seed + at)
            for problem, samples in zip(chunk, found, strict=True):
                at, drawn = at + 1, drawn + len(samples)
                # An answer that was cut off would be given an end that the policy has not put there.
                texts = [one.text for one in samples if one.text and (self.cut_off or one.finish_reason == "stop")]
                if texts:
                    best = best_over_worst(self.scores(problem, texts))
                    pairs += [Pair(asked(problem), texts[i], texts[j]) for i, j in best]
                if len(pairs) == count:
                    break
        return pairs, at, drawn

    def train(self, arm: Arm, aligner: Aligner, rate: float, seed: int) -> Outcome:
        """Four quarters of pairs and steps, at whose borders pairs may be drawn and the reference may move."""
        quarter, each = self.pairs // QUARTERS, self.pairs // arm.rounds
        run, reference, pairs, at, samples, looks = aligner.begin(self.starts[seed], rate), {}, [], 0, 0, []
        for number in range(QUARTERS):
            if number % (QUARTERS // arm.references) == 0:
                reference = run.params
            if not pairs:
                pairs, at, drawn = self.draw(run.params, each, at, seed) if number else self.first(seed, each)
                samples += drawn
            rows: Rows = self.ground.pairs(pairs[:quarter])
            pairs = pairs[quarter:]
            run.train(self.ground.against(reference, rows), self.options.steps // QUARTERS, QUARTERS * seed + number)
            correct = self.answers.exact_match(run.params, self.reported)
            looks.append(float(correct.mean()))
        choosing = self.answers.exact_match(run.params, self.choosing)
        return Outcome(samples, float(choosing.mean()), looks, correct)


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=64)
    parser.add_argument("--rates", nargs="+", type=float, default=(1e-4, 3e-4, 1e-3))
    parser.add_argument("--pairs", type=int, default=512)
    options = parser.parse_args()
    if options.steps % QUARTERS or options.pairs % QUARTERS:
        parser.error(f"--steps and --pairs have to be multiples of {QUARTERS}")
    study = Study(options)
    at_start = np.stack([study.answers.exact_match(start, study.reported) for start in study.starts])
    shares = cell(list(map(float, at_start.mean(axis=1))))
    say(f"start: {shares}")
    body: list[list[Any]] = [["", "start", "", "", shares, "", ""]]
    curves = {}
    for of_loss, config in LOSSES.items():
        aligner = Aligner(study.ground, preference_loss(config), options.steps)
        ends: dict[str, np.ndarray] = {}
        for name, arm in ARMS.items():
            found = {
                rate: [study.train(arm, aligner, rate, seed) for seed in range(options.seeds)] for rate in options.rates
            }
            for rate, seeds in found.items():
                say(f"{of_loss}, {name}, {rate:g}: {cell([one.choosing for one in seeds])}")
            rate = max(found, key=lambda rate: mean(one.choosing for one in found[rate]))
            ends[name] = np.stack([one.correct for one in found[rate]])
            beside = [difference(ends[name], other) for other in (at_start, ends[OFFLINE])]
            samples = round(mean(one.samples for one in found[rate]))
            exact = cell([one.looks[-1] for one in found[rate]])
            body.append([of_loss, name, f"{rate:g}", samples, exact, *beside])
            looks = [at_start.mean(), *np.mean([one.looks for one in found[rate]], axis=0)]
            used = [study.pairs * i / QUARTERS for i in range(QUARTERS + 1)]
            curves[f"{of_loss}, {name}"] = [(at, float(value)) for at, value in zip(used, looks, strict=True)]
    head = ["loss", "pairs", "learning rate", "samples", "exact match", "beside the start", f"beside {OFFLINE}"]
    print(table(head, body))
    Path(options.svg).write_text(lines(curves, "pairs used; exact match on held-out problems"))


if __name__ == "__main__":
    main()
