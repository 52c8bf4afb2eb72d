"""Offline against iterative preference training, at equal numbers of pairs and steps, with the same loss.

    python experiments/studies/offline_iterative.py [--seeds 3] [--pairs 512 4096] [--steps 256]

DPO on answers whose true reward is known (`known_reward.py`), so that a policy's mean reward and its KL from the first
policy are exact. Every arm gets as many pairs, judged by the same Bradley-Terry judge, and takes as many steps with one
optimizer from beginning to end. Two things differ, and each is tried without the other:

- where pairs are from: all drawn from the first policy (offline), or a quarter at a time from the policy as it then is;
- the reference: the first policy all along, or the policy of each round's start, as iterative DPO has it (Dong et al.
  2024, arXiv:2405.07863; Xu et al. 2023, arXiv:2312.16682).

With the first policy as the reference, all these go to pi_ref exp(r / beta) / Z, wherever pairs are from, given enough
of them. A reference that moves goes there again from where it is: after n rounds to pi_ref exp(n r / beta) / Z, what a
fixed reference reaches with beta / n. So at one beta an arm with moving references has more reward and more KL for no
other reason, and arms are compared at equal KL: on the upper hulls of their points over beta and training.

Each arm has the best of RATES for it in a world (prompts, first policy, pairs) that is not reported. Seeds are worlds.
Prints Markdown tables: KL and reward at the end by beta, and reward at equal KL with the difference to offline
training. The plot has the frontiers, of the most pairs.
"""

import functools
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import PLAN, cell, make_parser, say, table
from frontiers import DENSE, HEAD, KLS, OTHER_WORLD, best_rate, cells, frontier
from known_reward import Aligner, Pairs, Point, World, make_world, of_pairs, rewards
from known_reward import table as logps_of_all
from plot import lines

from llm_jax import objectives
from llm_jax.training import init_state, weights_in_use

RATES = (3e-4, 1e-3, 3e-3)
BETAS = (0.1, 0.3, 1.0, 3.0)
QUARTERS, PASSES = 4, 4


@dataclass(frozen=True)
class Arm:
    rounds: int = 1
    """Draws of pairs."""
    references: int = 1
    """How often the reference is set to the policy, the start among them."""


OFFLINE, OPTIMUM = "offline", "optimum"
ARMS = {
    OFFLINE: Arm(),
    "offline, the reference moves": Arm(references=4),
    "4 rounds, the reference stays": Arm(rounds=4),
    "2 rounds": Arm(rounds=2, references=2),
    "4 rounds": Arm(rounds=4, references=4),
}


def drawn(world: World, logps: np.ndarray, count: int, seed: int) -> Pairs:
    """So many pairs of a policy's answers, of whose log-probabilities `logps` has all."""
    # Of a policy that has made up its mind most pairs are of equal answers, and left out.
    for draws in (16, 64, 256):
        found = replace(world, train_logps=logps).pairs(draws * count, seed)
        if found.count >= count:
            return Pairs(world, found.prompts[:count], found.answers[:count])
    raise SystemExit(f"{count} pairs wanted, {found.count} found: the policy gives one answer to nearly all prompts")


@functools.cache
def aligner(beta: float, rate: float, steps: int) -> Aligner:
    return Aligner(of_pairs(objectives.dpo)(beta), rate, steps)


@functools.cache
def world(seed: int, small: bool) -> World:
    return make_world(seed, 10, 2) if small else make_world(seed)


def train(own: World, arm: Arm, aligner: Aligner, pairs: int, seed: int) -> list[Point]:
    """KL and reward after each quarter of pairs and steps; it may begin with new pairs, and a new reference."""
    steps = aligner.steps // QUARTERS
    batch = PASSES * pairs // aligner.steps
    state = init_state({"policy": jax.tree.map(np.array, own.params)}, aligner.optimizer, aligner.declared, PLAN())
    params: Any = own.params
    reference = policy = own.train_logps
    found: list[Point] = []
    fresh = drawn(own, own.train_logps, pairs // arm.rounds, QUARTERS * seed)
    for number in range(QUARTERS):
        draws = number and number % (QUARTERS // arm.rounds) == 0
        moves = number and number % (QUARTERS // arm.references) == 0
        if draws or moves:
            policy = logps_of_all(params, own.train)
        if draws:
            fresh = drawn(own, policy, pairs // arm.rounds, QUARTERS * seed + number)
        if moves:
            reference = policy
        # A draw lasts for several quarters where there are fewer rounds.
        first = number % (QUARTERS // arm.rounds) * (pairs // QUARTERS)
        places = np.arange(first, first + pairs // QUARTERS)
        feed = Pairs(replace(own, train_logps=reference), fresh.prompts[places], fresh.answers[places])
        chance = np.random.default_rng([seed, number])
        order = np.concatenate([chance.permutation(feed.count) for _ in range(PASSES)])
        for index in order[: steps * batch].reshape(steps, batch):
            state, _ = aligner.step(state, {name: x[None] for name, x in feed.rows(index).items()})
        params = jax.device_get(weights_in_use(state)["policy"])
        found.append(own.at(params))
    return found


class Study:
    def __init__(self, options: Namespace):
        self.options, self.small = options, options.scale == "test"
        self.betas = BETAS[1:3] if self.small else BETAS

    def frontier(self, seed: int, found: list[Point], kls: Any) -> list[float]:
        return frontier(world(seed, self.small), found, kls)

    def points(self, arm: Arm, beta: float, rate: float, pairs: int, seed: int) -> list[Point]:
        return train(world(seed, self.small), arm, aligner(beta, rate, self.options.steps), pairs, seed)

    def best_rate(self, name: str, pairs: int) -> float:
        """By the two beta in the middle."""

        def points(rate: float) -> list[Point]:
            betas = self.betas[-3:-1] or self.betas
            return [one for beta in betas for one in self.points(ARMS[name], beta, rate, pairs, OTHER_WORLD)]

        return best_rate(f"{pairs} pairs, {name}", self.options.rates, world(OTHER_WORLD, self.small), points)

    def optimum(self, seed: int) -> list[Point]:
        own = world(seed, self.small)
        return own.optimum(rewards(own.held_out))


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=256)
    parser.add_argument("--pairs", nargs="+", type=int, default=(512, 4096))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    options = parser.parse_args()
    for pairs in options.pairs:
        if options.steps % QUARTERS or PASSES * pairs % options.steps:
            parser.error(f"--steps has to be a multiple of {QUARTERS} and a divisor of {PASSES} times --pairs")
    study, seeds = Study(options), range(options.seeds)
    ends, body, curves = [], [], {}
    for pairs in options.pairs:
        at: dict[str, list[list[float]]] = {OPTIMUM: [study.frontier(s, study.optimum(s), KLS) for s in seeds]}
        curves = {OPTIMUM: [study.frontier(s, study.optimum(s), DENSE) for s in seeds]}
        rates = {}
        for name, arm in ARMS.items():
            rates[name] = study.best_rate(name, pairs)
            found: list[list[Point]] = [[] for _ in seeds]
            for beta in study.betas:
                along = [study.points(arm, beta, rates[name], pairs, seed) for seed in seeds]
                for points, more in zip(found, along, strict=True):
                    points += more
                last = [cell([getattr(one[-1], what) for one in along], 2) for what in ("kl", "reward")]
                ends.append([pairs, name, f"{beta:g}", *last])
                say(" | ".join(map(str, ends[-1])))
            at[name], curves[name] = (
                [study.frontier(s, one, kls) for s, one in zip(seeds, found, strict=True)] for kls in (KLS, DENSE)
            )
        for name, each in at.items():
            others = at[OFFLINE] if name not in (OFFLINE, OPTIMUM) else None
            body.append([pairs, name, f"{rates[name]:g}" if name in rates else "", *cells(each, others)])
    print(table(["pairs", "arm", "beta", "KL at the end", "reward at the end"], ends) + "\n")
    print(table(["pairs", "arm", "learning rate", *HEAD], body))
    drawn_curves = {name: list(zip(DENSE, np.mean(each, axis=0).tolist())) for name, each in curves.items()}
    Path(options.svg).write_text(lines(drawn_curves, "KL(policy || first policy), nats an answer; mean true reward"))


if __name__ == "__main__":
    main()
