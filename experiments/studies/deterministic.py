"""Preferences without doubt: does DPO leave its reference whatever beta is, and does IPO stay?

    python experiments/studies/deterministic.py [--steps 512] [--seeds 3] [--parts bandit model]

The claim is that of Azar et al. 2023 (arXiv:2310.12036, sections 4.2 and 5.4). Where one answer is always preferred,
the Bradley-Terry rewards that DPO fits are infinitely far apart, so the loss is least at a policy that gives the
preferred answer alone, for every beta. IPO asks for a log-ratio of 1 / (2 tau), and its policy is
pi_ref exp(P(y ≻ pi_ref) / tau) / Z. The claim is of where a loss ends; here KL(policy || reference) is seen on the way.

- `bandit`: three answers a, b, c without a prompt, as in section 5.4 of the paper: a policy of three logits, a uniform
  reference, all pairs in each step (Adam, rate 0.01). `certain`: a before b, b before c, a before c. `doubtful`: each
  of these pairs four times, once the other way round. DPO's limit of the former is log 3 nats.
- `model`: small models on answers of known reward (`known_reward.py`), on prompts that were not trained on. `certain`:
  the answer of the larger reward is preferred; `doubtful`: by Bradley and Terry. Few certain pairs are seen many times.
  DPO's limit of certain pairs gives the best answer to each prompt alone, KL -log pi_ref(best). All learn at one rate.

Prints a Markdown table for each part: KL by the number of steps, and what it comes to in the end; `still grows` where
the last look's KL is above that of the one before beyond the spread of the seeds. The plot is the model's KL by steps,
of certain pairs.
"""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import cell, changed, make_parser, mean, say, table
from known_reward import Aligner, Pairs, Point, World, make_world, of_pairs, point, rewards, tilted, win_rates
from plot import lines

from llm_jax import objectives

DPO, IPO = "DPO", "IPO"
LOSSES = {DPO: objectives.dpo, IPO: functools.partial(objectives.ipo, length_normalized=False)}
STRENGTHS = (0.1, 1.0, 10.0)
CERTAIN, DOUBTFUL, FEW = "certain", "doubtful", "certain, few"
ORDER = np.array([(0, 1), (1, 2), (0, 2)])
BANDITS = {CERTAIN: ORDER, DOUBTFUL: np.concatenate([ORDER, ORDER, ORDER, ORDER[:, ::-1]])}
ANSWERS = 3
RATE = 1e-3


@functools.partial(jax.jit, static_argnums=(0, 3))
def _walk(loss: Callable[..., Any], strength: float, pairs: Any, steps: int, state: Any) -> Any:
    """So many steps of a bandit's three logits."""
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    reference = jnp.full(len(pairs), -jnp.log(ANSWERS))

    def value(logits: jax.Array) -> jax.Array:
        logps = jax.nn.log_softmax(logits)
        return loss(logps[chosen], logps[rejected], reference, reference, strength)[0].mean()

    def step(_: Any, state: Any) -> Any:
        logits, moments = state
        updates, moments = _ADAM.update(jax.grad(value)(logits), moments)
        return logits + updates, moments

    return jax.lax.fori_loop(0, steps, step, state)


_ADAM = optax.adam(0.01)


def bandit(name: str, strength: float, pairs: np.ndarray, looks: tuple[int, ...]) -> list[float]:
    """KL to the uniform reference at each look, nats."""

    def loss(*logps: jax.Array) -> Any:
        return LOSSES[name](*logps[:-1], beta=strength)

    logits = jnp.zeros(ANSWERS)
    state, done, found = (logits, _ADAM.init(logits)), 0, []
    for look in looks:
        state = _walk(loss, strength, pairs, look - done, state)
        done = look
        logps = np.asarray(jax.nn.log_softmax(state[0]), np.float64)
        found.append(float((np.exp(logps) * (logps + np.log(ANSWERS))).sum()))
    return found


def ipo_limit(strength: float, pairs: np.ndarray) -> float:
    """KL of IPO's policy on a bandit: that of pi_ref exp(P(y ≻ pi_ref) / tau) / Z."""
    wins = np.zeros((ANSWERS, ANSWERS))
    np.add.at(wins, tuple(pairs.T), 1)
    # An answer wins against itself in half of all cases.
    shares = (wins + np.eye(ANSWERS)) / (wins + wins.T + 2 * np.eye(ANSWERS))
    reference = np.full((1, ANSWERS), -np.log(ANSWERS))
    logps = tilted(reference, shares.mean(axis=1)[None], strength)
    return point(logps, reference, np.zeros_like(logps)).kl


def bandit_table(options: Namespace) -> str:
    looks = (10, 100) if options.scale == "test" else (100, 1000, 10_000, 100_000, 1_000_000)
    body = []
    for data, pairs in BANDITS.items():
        for name in LOSSES:
            for strength in STRENGTHS:
                limit = f"{ipo_limit(strength, pairs):.4f}" if name == IPO else ""
                if name == DPO and data == CERTAIN:
                    limit = f"{np.log(ANSWERS):.4f}"
                found = [f"{kl:.4f}" for kl in bandit(name, strength, pairs, looks)]
                body.append([data, name, f"{strength:g}", *found, limit])
    return table(["pairs", "loss", "beta", *(f"KL after {look:,} steps" for look in looks), "limit"], body)


@functools.cache
def aligner(name: str, strength: float, steps: int) -> Aligner:
    return Aligner(of_pairs(LOSSES[name])(strength), RATE, steps)


class Study:
    """Small models, a world for each seed."""

    def __init__(self, options: Namespace):
        small = options.scale == "test"
        self.options = options
        self.worlds = [make_world(seed, 10, 2) if small else make_world(seed) for seed in range(options.seeds)]
        self.strengths = STRENGTHS[:2] if small else STRENGTHS
        self.looks = [options.steps >> shift for shift in (6, 4, 2, 0) if options.steps >> shift]

    def pairs(self, data: str, seed: int) -> Pairs:
        count = self.options.few if data == FEW else self.options.pairs
        return self.worlds[seed].pairs(count, seed, certain=data != DOUBTFUL)

    def points(self, data: str, name: str, strength: float, seed: int) -> list[Point]:
        """At each look."""
        own, train = self.worlds[seed], aligner(name, strength, self.options.steps)
        return [own.at(params) for params in train(own, self.pairs(data, seed), seed, self.options.batch, self.looks)]

    def limit(self, data: str, name: str, strength: float) -> str:
        """KL where the loss is least, given all pairs; empty where that is in no closed form."""
        if name == IPO:
            return cell([_ipo_limit(own, strength, data != DOUBTFUL).kl for own in self.worlds], 2)
        if data == DOUBTFUL:
            # The reward that DPO fits is the judge's own.
            return cell([own.optimum(rewards(own.held_out), (strength,))[0].kl for own in self.worlds], 2)
        return cell([_best(own) for own in self.worlds], 2)

    def table(self) -> tuple[str, dict[str, list[tuple[float, float]]]]:
        body, curves = [], {}
        for data in (CERTAIN, FEW, DOUBTFUL):
            for name in LOSSES:
                for strength in self.strengths:
                    found = [self.points(data, name, strength, seed) for seed in range(self.options.seeds)]
                    kls, values = (list(zip(*([p[i] for p in one] for one in found), strict=True)) for i in range(2))
                    grown = changed([b - a for a, b in zip(kls[-2], kls[-1], strict=True)])
                    told = "still grows" if grown == "higher" else "shrinks" if grown == "lower" else "stands"
                    best = max(range(len(values)), key=lambda i: mean(values[i]))
                    body.append([data, name, f"{strength:g}", *(cell(each, 2) for each in kls), told])
                    body[-1] += [self.limit(data, name, strength), cell(values[-1], 2)]
                    body[-1].append(f"{mean(values[best]):.2f} after {self.looks[best]}")
                    say(" | ".join(body[-1]))
                    if data == CERTAIN:
                        along = zip(self.looks, map(mean, kls), strict=True)
                        curves[f"{name}, {strength:g}"] = [(float(step), kl) for step, kl in along]
        head = ["pairs", "loss", "beta", *(f"KL after {look} steps" for look in self.looks), "then", "limit"]
        return table([*head, "reward in the end", "reward at its best"], body), curves


def _ipo_limit(own: World, strength: float, certain: bool) -> Point:
    return own.optimum(win_rates(own.held_out_logps, rewards(own.held_out), certain), (strength,))[0]


def _best(own: World) -> float:
    """KL of the policy that gives the best answer to each prompt alone, on average."""
    places = rewards(own.held_out).argmax(axis=1)
    return float(-own.held_out_logps[np.arange(len(places)), places].mean())


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=512)
    parser.add_argument("--parts", nargs="+", choices=("bandit", "model"), default=("bandit", "model"))
    parser.add_argument("--pairs", type=int, default=4096, help="pairs of answers, over all training prompts")
    parser.add_argument("--few", type=int, default=256, help="how many where they are few")
    parser.add_argument("--batch", type=int, default=64, help="pairs a step")
    options = parser.parse_args()
    if "bandit" in options.parts:
        print(bandit_table(options) + "\n", flush=True)
    if "model" in options.parts:
        said, curves = Study(options).table()
        print(said)
        Path(options.svg).write_text(lines(curves, "training steps; KL(policy || reference), nats", log_x=True))


if __name__ == "__main__":
    main()
