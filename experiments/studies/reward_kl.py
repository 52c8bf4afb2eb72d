"""True reward against KL to the reference, of losses on preferences: which has the most reward at the same KL.

    python experiments/studies/reward_kl.py [--methods DPO KTO ...] [--steps 256] [--seeds 5]

The shape of figure 2 (left) of Rafailov et al. 2023: each loss is swept over its strength and over points in training;
a policy is a point (KL, reward), and a loss's frontier the upper hull of its points. The claim there is that DPO's lies
above the others'. Here the reward is known and a policy's KL and mean reward are exact (`known_reward.py`), on prompts
that were not trained on, so the best frontier there can be is known too: that of π_ref exp(r / β) / Z, where DPO goes
with all pairs there are. IPO goes to π_ref exp(P(y ≻ π_ref) / τ) / Z (Azar et al. 2023, eq. 8), whose frontier lies
below.

All take the same pairs, as many a step, and start at the reference, ORPO and SimPO too; KTO takes the pairs' answers
one by one. Each has the best of RATES for it in a world (prompts, reference, pairs) that is not reported, at its two
strengths in the middle. Seeds are worlds. Prints Markdown tables; the plot has the frontiers' mean over the seeds.
"""

import functools
from argparse import Namespace
from pathlib import Path

import numpy as np
from common import cell, make_parser, say, table
from frontiers import DENSE, HEAD, KLS, OTHER_WORLD, best_rate, cells, frontier
from known_reward import Aligner, Method, Point, World, make_world, of_answers, of_pairs, rewards, win_rates
from plot import lines

from llm_jax import objectives

RATES = (3e-4, 1e-3, 3e-3)
PER_TOKEN = "IPO per token"


def simpo(beta: float):
    """γ / β = 0.25, the default of the authors' code."""
    return of_pairs(functools.partial(objectives.simpo, simpo_gamma=beta / 4), reference=False, lengths=True)(beta)


METHODS = {
    "DPO": Method((0.1, 0.3, 1.0, 3.0), of_pairs(objectives.dpo)),
    "IPO": Method((0.03, 0.1, 0.3, 1.0), of_pairs(functools.partial(objectives.ipo, length_normalized=False))),
    PER_TOKEN: Method((0.1, 0.3, 1.0, 3.0), of_pairs(objectives.ipo, lengths=True)),
    "KTO": Method((0.1, 0.3, 1.0, 3.0), of_answers(), unpaired=True),
    "SimPO": Method((1.0, 2.5, 6.0, 15.0), simpo),
    "ORPO": Method((0.1, 0.5, 2.0, 8.0), of_pairs(objectives.orpo, reference=False, lengths=True)),
}
OPTIMUM, IPO_OPTIMUM = "optimum", "IPO's optimum"


@functools.cache
def aligner(name: str, strength: float, rate: float, steps: int) -> Aligner:
    return Aligner(METHODS[name].loss(strength), rate, steps)


def looks(steps: int) -> list[int]:
    """Points in training, each twice as far as the one before."""
    return [steps >> i for i in reversed(range(6)) if steps >> i]


def world(options: Namespace, seed: int) -> World:
    return make_world(seed, 10, 2) if options.scale == "test" else make_world(seed)


def points(options: Namespace, name: str, strength: float, rate: float, seed: int) -> list[Point]:
    """At each look."""
    own = world(options, seed)
    pairs = own.pairs(options.pairs, seed)
    unpaired = METHODS[name].unpaired
    feed, batch = (pairs.labelled(), 2 * options.batch) if unpaired else (pairs, options.batch)
    policies = aligner(name, strength, rate, options.steps)(own, feed, seed, batch, looks(options.steps))
    return [own.at(params) for params in policies]


def chosen_rate(options: Namespace, name: str) -> float:
    """By the two strengths in the middle."""

    def found(rate: float) -> list[Point]:
        middle = strengths(options, name)[1:3]
        return [one for s in middle for one in points(options, name, s, rate, OTHER_WORLD)]

    return best_rate(name, options.rates, world(options, OTHER_WORLD), found)


def strengths(options: Namespace, name: str) -> tuple[float, ...]:
    every = METHODS[name].strengths
    return every[1:2] if options.scale == "test" else every


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=256)
    parser.set_defaults(seeds=5)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--pairs", type=int, default=4096, help="pairs of answers, over all training prompts")
    parser.add_argument("--batch", type=int, default=64, help="pairs a step")
    options = parser.parse_args()
    study(options)


def study(options: Namespace) -> None:
    seeds = range(options.seeds)
    curves: dict[str, list[list[float]]] = {}
    at: dict[str, list[list[float]]] = {}

    def keep(name: str, found: list[list[Point]]) -> None:
        """Frontiers of a method, of one world after the other."""
        worlds = [world(options, seed) for seed in seeds]
        curves[name] = [frontier(own, each, DENSE) for own, each in zip(worlds, found)]
        at[name] = [frontier(own, each, KLS) for own, each in zip(worlds, found)]

    optima: dict[str, list[list[Point]]] = {OPTIMUM: [], IPO_OPTIMUM: []}
    for seed in seeds:
        own = world(options, seed)
        values = rewards(own.held_out)
        optima[OPTIMUM].append(own.optimum(values))
        optima[IPO_OPTIMUM].append(own.optimum(win_rates(own.held_out_logps, values)))
    for name, found in optima.items():
        keep(name, found)
    rates, ends = {}, []
    for name in options.methods:
        rates[name] = chosen_rate(options, name)
        found: list[list[Point]] = [[] for _ in seeds]
        for strength in strengths(options, name):
            last = []
            for seed in seeds:
                along = points(options, name, strength, rates[name], seed)
                found[seed] += along
                last.append(along[-1])
            ends.append([name, f"{strength:g}", cell([p.kl for p in last], 2), cell([p.reward for p in last], 2)])
            say(" | ".join(ends[-1]))
        keep(name, found)
    print(table(["method", "strength", "KL at the end", "reward at the end"], ends) + "\n")
    body = []
    for name, each in at.items():
        others = at["DPO"] if name in rates and name != "DPO" else None
        body.append([name, f"{rates[name]:g}" if name in rates else "", *cells(each, others)])
    print(table(["method", "learning rate", *HEAD], body))
    drawn = {
        name: list(zip(DENSE, np.mean(each, axis=0).tolist())) for name, each in sorted(curves.items(), key=_height)
    }
    Path(options.svg).write_text(lines(drawn, "KL(policy || reference), nats an answer; mean true reward"))


def _height(curve: tuple[str, list[list[float]]]) -> float:
    return -float(np.mean(curve[1], axis=0)[-1])


if __name__ == "__main__":
    main()
