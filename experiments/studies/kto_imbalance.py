"""KTO where few answers are desirable, or few are not, and where answers are of no pair, beside DPO on pairs.

    python experiments/studies/kto_imbalance.py [--arms DPO "KTO, 1:1" ...] [--steps 256] [--seeds 3]

The claims are those of Ethayarajh et al. 2024 (arXiv:2402.01306): KTO needs no pairs and is as good as DPO on them; and
it still is with a tenth of the desirable answers, if the weights keep lambda_D n_D as large as lambda_U n_U. The reward
is known and a policy's KL and mean reward are exact (`known_reward.py`), on prompts that were not trained on. Pairs are
judged by Bradley and Terry; an answer is desirable that was preferred in its pair.

- DPO on all pairs, and on a tenth of them: what is left of pairs where nine of ten desirable answers are missing.
- KTO on both answers of all pairs (1:1); on one answer of each of twice as many pairs, which is as many answers and no
  pair; and on the pairs' answers with a third or a tenth of one kind, under equal weights or with that kind's answers
  weighing as many times as much.

Arms take as many answers a step (a pair is two) and as many steps. Each has the best of RATES for it in a world
(prompts, reference, pairs) that is not reported. Policies are compared at equal KL, on the upper hulls of their points
over beta and training (`frontiers.py`). Seeds are worlds.

Prints a Markdown table of rewards at equal KL, and of their mean beside that of other arms, world by world. The plot
has the frontiers' mean over the seeds.
"""

import functools
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import cell, changed, make_parser, mean, say, table
from frontiers import DENSE, HEAD, KLS, OTHER_WORLD, best_rate, cells, frontier
from known_reward import Aligner, Feed, Labelled, Point, World, make_world, of_answers, of_pairs
from plot import lines

from llm_jax import objectives

RATES = (1e-3, 3e-3)
BETAS = (0.1, 0.3, 1.0)
MIDDLE = 0.3
DPO, BALANCED = "DPO", "KTO, 1:1"


@dataclass(frozen=True)
class Arm:
    """What is learned from, by which loss."""

    beside: tuple[str, ...] = ()
    """Arms that it is compared with."""
    paired: bool = False
    """DPO on pairs."""
    whole_pairs: bool = True
    """Answers are of as many pairs, both of each; else one of each of twice as many."""
    desirable: float = 1.0
    undesirable: float = 1.0
    """Share of the answers of each kind that is kept."""
    weights: tuple[float, float] = (1.0, 1.0)
    """Of desirable and undesirable answers."""


ARMS = {
    DPO: Arm(paired=True),
    "DPO, a tenth": Arm((DPO,), paired=True, desirable=0.1),
    BALANCED: Arm((DPO,)),
    "KTO, 1:1, unpaired": Arm((DPO, BALANCED), whole_pairs=False),
    "KTO, 1:3, weighted": Arm((DPO, BALANCED), desirable=1 / 3, weights=(3.0, 1.0)),
    "KTO, 1:10": Arm((DPO, BALANCED), desirable=0.1),
    "KTO, 1:10, weighted": Arm((DPO, "DPO, a tenth", BALANCED, "KTO, 1:10"), desirable=0.1, weights=(10.0, 1.0)),
    "KTO, 3:1, weighted": Arm((DPO, BALANCED), undesirable=1 / 3, weights=(1.0, 3.0)),
    "KTO, 10:1": Arm((DPO, BALANCED), undesirable=0.1),
    "KTO, 10:1, weighted": Arm((DPO, "DPO, a tenth", BALANCED, "KTO, 10:1"), undesirable=0.1, weights=(1.0, 10.0)),
}


def feed(own: World, arm: Arm, count: int, seed: int) -> Feed:
    """Of so many pairs, or as many answers."""
    pairs = own.pairs(count if arm.whole_pairs else 2 * count, seed)
    if arm.paired:
        kept = round(arm.desirable * count)
        return pairs if kept == count else type(pairs)(own, pairs.prompts[:kept], pairs.answers[:kept])
    answers = pairs.labelled()
    if not arm.whole_pairs:
        # The chosen and the rejected answer of a pair lie side by side.
        sides = np.random.default_rng([seed, 4]).integers(2, size=pairs.count)
        return answers.some(2 * np.arange(pairs.count) + sides)
    return answers.some(_kept(answers, arm))


def _kept(answers: Labelled, arm: Arm) -> np.ndarray:
    """The first ones of each kind, in their order."""
    places = [np.flatnonzero(answers.labels == label) for label in (True, False)]
    shares = (arm.desirable, arm.undesirable)
    return np.sort(np.concatenate([p[: round(share * len(p))] for p, share in zip(places, shares, strict=True)]))


@functools.cache
def aligner(paired: bool, weights: tuple[float, float], beta: float, rate: float, steps: int) -> Aligner:
    loss = of_pairs(objectives.dpo) if paired else of_answers(*weights)
    return Aligner(loss(beta), rate, steps)


class Study:
    def __init__(self, options: Namespace):
        self.options, self.small = options, options.scale == "test"
        self.betas = (MIDDLE,) if self.small else BETAS
        self.looks = [options.steps >> i for i in reversed(range(4)) if options.steps >> i]

    def world(self, seed: int) -> World:
        return make_world(seed, 10, 2) if self.small else make_world(seed)

    def points(self, arm: Arm, beta: float, rate: float, seed: int) -> list[Point]:
        """At each look."""
        own, batch = self.world(seed), self.options.batch * (1 if arm.paired else 2)
        train = aligner(arm.paired, arm.weights, beta, rate, self.options.steps)
        given = feed(own, arm, self.options.pairs, seed)
        return [own.at(params) for params in train(own, given, seed, batch, self.looks)]

    def arm(self, name: str) -> tuple[float, list[list[Point]]]:
        """The rate, and the points of each seed."""
        arm = ARMS[name]
        rate = best_rate(
            name,
            self.options.rates,
            self.world(OTHER_WORLD),
            lambda rate: self.points(arm, MIDDLE, rate, OTHER_WORLD),
        )
        every = [[self.points(arm, beta, rate, seed) for beta in self.betas] for seed in range(self.options.seeds)]
        for i, beta in enumerate(self.betas):
            last = [of_seed[i][-1] for of_seed in every]
            said = [f"{what} {cell([getattr(one, what) for one in last], 2)}" for what in ("kl", "reward")]
            say(f"{name}, beta {beta:g}, in the end: {', '.join(said)}")
        return rate, [[one for along in of_seed for one in along] for of_seed in every]


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=256)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="of these alone")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--pairs", type=int, default=4096, help="pairs of answers, over all training prompts")
    parser.add_argument("--batch", type=int, default=64, help="pairs a step")
    options = parser.parse_args()
    study, seeds = Study(options), range(options.seeds)
    at: dict[str, list[list[float]]] = {}
    curves, body = {}, []
    for name in options.arms:
        rate, found = study.arm(name)
        at[name] = [frontier(study.world(seed), one, KLS) for seed, one in zip(seeds, found, strict=True)]
        drawn = [frontier(study.world(seed), one, DENSE) for seed, one in zip(seeds, found, strict=True)]
        curves[name] = list(zip(DENSE, np.mean(drawn, axis=0).tolist(), strict=True))
        own = list(map(mean, at[name]))
        beside = []
        for other in ARMS[name].beside:
            if other in at:
                differences = [a - b for a, b in zip(own, map(mean, at[other]), strict=True)]
                beside.append(f"{other}: {mean(differences):+.3f} {changed(differences)}")
        body.append([name, f"{rate:g}", *cells(at[name], None), cell(own), "; ".join(beside)])
        say(" | ".join(body[-1]))
    print(table(["arm", "learning rate", *HEAD, "their mean", "beside"], body))
    Path(options.svg).write_text(lines(curves, "KL(policy || reference), nats an answer; mean true reward"))


if __name__ == "__main__":
    main()
