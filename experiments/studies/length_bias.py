"""Length bias of preference training, with and without a normalisation by length.

    python experiments/studies/length_bias.py [--seeds 3] [--steps 40] [--rates 3e-5 1e-4 3e-4]

Of a pair the chosen answer is a careful one in 80% of cases, the other a guess, and under `longer` the chosen one has
more remarks, which say nothing: behind each of three places another one each time with probability 0.37 against 0.30, a
tenth more tokens on average (`remarks.py`). Under `equal` both have as many. The first policy writes like either, and
goes on with a remark with probability 1/3.

What a loss asks for, given endless data and training; a remark costs log 3 = 1.1 nats under the first policy:

- DPO: log pi - log pi_start = r / beta, r being the pairs' own log-odds, to which a remark adds log(0.37 / 0.30) = 0.21
  under `longer`: 2.1 nats at beta 0.1, so answers without an end. Under `equal` nothing.
- SimPO on sums: log pi = r / beta. So a remark must cost nothing, whether or not anybody prefers it: + 1.1 nats under
  `equal`. That is the bias its normalisation is for.
- SimPO: log pi / |y| = r / beta. So a remark may cost per token what the rest does: the bias is gone if it did so from
  the start (8 tokens, 0.14 each), and not if it is more surprising than the rest. `surprising` has four remarks of 4
  tokens to choose from, log 12 / 4 = 0.62 each.
- sigmoid_norm is DPO with averages, LD-DPO gives the tokens beyond the shorter answer's length half the weight.

All betas mean the same for answers of average length: 0.1 a nat of a sum, 0.1 times that length for an average. The
rate of each loss is the one whose samples are right most often on other problems than those reported, under `longer`.

Prints a Markdown table: how often samples (temperature 1) are right, their tokens and remarks; and of careful answers
to held-out problems what a remark adds to the policy's reward log pi - log pi_start, and that reward's correlation with
the length (both within problems). The plot has the tokens of samples by training steps.
"""

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from common import Rows, cell, compared, make_parser, mean, say, table
from jaxtyping import Array
from plot import lines
from remarks import GOES_ON, LARGEST, OPERATIONS, Remarks
from small_policies import Aligner, Answers, Ground, Params, Size, asked, problems

from llm_jax import objectives
from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded.problems import Problem, is_correct
from llm_jax.data.examples import Pair
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.preference_loss import PreferenceLoss, Term, preference_loss
from llm_jax.objectives.preference.named import Named

PLAIN, SURPRISING = "plain", "surprising"
REMARKS = {
    PLAIN: Remarks(("That was easy, now go on.",), most=5),
    SURPRISING: Remarks(("Let me see.", "That was easy.", "So it goes.", "Now go on."), most=8),
}
LONGER, EQUAL = "longer", "equal"
PAIRS = {LONGER: (0.37, 0.30), EQUAL: (GOES_ON, GOES_ON)}
BETA, MARGIN = 0.1, 1.0
WINDOW, LOOKS = 224, 4


def summed_simpo(beta: float) -> PreferenceLoss:
    """SimPO with 1 for every length."""

    def loss(chosen_logps: Array, rejected_logps: Array, **options: float) -> tuple[Array, dict[str, Array]]:
        ones = jnp.ones_like(chosen_logps)
        lengths = {"chosen_lengths": ones, "rejected_lengths": ones}
        return objectives.simpo(chosen_logps, rejected_logps, **options, **lengths)  # pyright: ignore

    named = Named("simpo", reference=False)
    return PreferenceLoss((Term("simpo", named, 1.0, loss, {"beta": beta, "simpo_gamma": MARGIN}),), beta)


def losses(length: float) -> dict[str, PreferenceLoss]:
    """All of equal scale for answers of `length` tokens."""

    def named(loss_type: str, **fields: Any) -> PreferenceLoss:
        return preference_loss(PreferenceConfig(loss_type=loss_type, **fields))

    return {
        "DPO": named("sigmoid", beta=BETA),
        "LD-DPO, alpha 0.5": named("sigmoid", beta=BETA, ld_alpha=0.5),
        "sigmoid_norm": named("sigmoid_norm", beta=BETA * length),
        "SimPO": named("simpo", beta=BETA * length, simpo_gamma=MARGIN, reference_logps="none"),
        "SimPO on sums": summed_simpo(BETA),
    }


@dataclass(frozen=True)
class Samples:
    right: float
    tokens: float
    remarks: float
    truncated: float


@dataclass(frozen=True)
class Outcome:
    tokens: list[float]
    """Of a sample, at each look."""
    choosing: float
    """Share of right samples on the problems by which a rate is chosen."""
    samples: Samples
    """On those that are reported."""
    slope: float
    """Nats of log pi - log pi_start for a remark."""
    correlation: float
    """Of log pi - log pi_start with the number of tokens."""


class Study:
    """Of one kind of remarks."""

    def __init__(self, options: argparse.Namespace, kind: str):
        small = options.scale == "test"
        self.options, self.said = options, REMARKS[kind]
        config = EmbeddedConfig(max_number=LARGEST, min_operations=OPERATIONS, max_operations=OPERATIONS)
        size = Size(width=32, layers=1, demonstrations=500, steps=4) if small else Size(steps=600)
        self.ground = Ground(config, self.said.demonstration, size, window=WINDOW)
        train, self.looked, self.choosing, self.reported = (
            problems(config, name, 16 if small else count, "train" if name == "train" else "eval")
            for name, count in (("train", 640), ("looked", 128), ("choosing", 256), ("reported", 512))
        )
        self.rows = {data: self.ground.pairs(self.said.preferences(train, PAIRS[data])) for data in PAIRS}
        self.lengths = {data: [_tokens(rows, side) for side in (1, 2)] for data, rows in self.rows.items()}
        self.losses = losses(float(np.mean(self.lengths[EQUAL])))
        chance = random.Random("measured")
        counts = [[self.said.numbers(GOES_ON, chance) for _ in range(8)] for _ in self.looked]
        texts = [[self.said.answer(p, True, c, chance) for c in own] for p, own in zip(self.looked, counts)]
        self.measured = self.ground.pairs(
            Pair(asked(p), *two) for p, own in zip(self.looked, texts) for two in zip(own[::2], own[1::2])
        )
        self.remarks = np.array([[sum(each) for each in own] for own in counts], float)
        self.starts = [self.ground.start(seed) for seed in range(options.seeds)]
        self.answers = Answers(self.ground, self.starts[0], max_tokens=8 if small else 160)
        self.before = [self._measured_logps(start) for start in self.starts]
        self.begun = [self.samples(start, self.reported, seed) for seed, start in enumerate(self.starts)]
        self.looked_at = [self.samples(start, self.looked, seed).tokens for seed, start in enumerate(self.starts)]
        tokens, logps = self._measured_tokens(), np.stack(self.before)
        none = self.remarks == 0
        say(f"{kind}: a token of an answer without remarks costs {-(logps[:, none] / tokens[none]).mean():.3f} nats")
        for data, (chosen, rejected) in self.lengths.items():
            say(
                f"{kind}, {data}: {chosen.mean():.1f} tokens chosen, {rejected.mean():.1f} rejected; chosen longer in "
                f"{(chosen > rejected).mean():.2f}, shorter in {(chosen < rejected).mean():.2f} of pairs"
            )
        right, count = ([getattr(one, what) for one in self.begun] for what in ("right", "remarks"))
        say(f"{kind}, start: right {cell(right)}, remarks {cell(count)}")

    def samples(self, params: Params, shown: list[Problem], seed: int) -> Samples:
        drawn = [one for (one,) in self.answers(params, shown, seed=seed)]
        right = [is_correct(problem, one.text) for problem, one in zip(shown, drawn, strict=True)]
        return Samples(
            mean(map(float, right)),
            mean(float(len(one.tokens)) for one in drawn),
            mean(float(self.said.count(one.text)) for one in drawn),
            mean(float(one.finish_reason == "length") for one in drawn),
        )

    def _measured_logps(self, params: Params) -> np.ndarray:
        """float64[problems, answers]"""
        said = self.ground.logps(params, self.measured)
        both = np.concatenate([said["chosen_logps"], said["rejected_logps"]], axis=1)
        return both.reshape(len(self.looked), -1).astype(np.float64)

    def _measured_tokens(self) -> np.ndarray:
        """float64[problems, answers]"""
        return np.stack([_tokens(self.measured, side) for side in (1, 2)], axis=1).reshape(len(self.looked), -1)

    def reward(self, params: Params, seed: int) -> tuple[float, float]:
        """What a remark adds to log pi - log pi_start in nats, and that reward's correlation with the tokens."""
        rewards = self._measured_logps(params) - self.before[seed]
        every = (rewards, self.remarks, self._measured_tokens())
        rewards, count, tokens = (x - x.mean(axis=1, keepdims=True) for x in every)
        slope = (rewards * count).sum() / (count**2).sum()
        spread = math.sqrt((rewards**2).sum() * (tokens**2).sum())
        return float(slope), float((rewards * tokens).sum() / spread)

    def train(self, aligner: Aligner, data: str, rate: float, seed: int) -> Outcome:
        start, rows = self.starts[seed], self.rows[data]
        if aligner.reference:
            rows = self.ground.against(start, rows, aligner.ld_alpha)
        run = aligner.begin(start, rate)
        seen = run.train(rows, self.options.steps, seed, lambda p: self.samples(p, self.looked, seed).tokens, LOOKS)
        choosing, reported = (self.samples(run.params, shown, seed) for shown in (self.choosing, self.reported))
        return Outcome(seen, choosing.right, reported, *self.reward(run.params, seed))


def _tokens(rows: Rows, side: int) -> np.ndarray:
    """float64[pairs]: of the answers of one side."""
    return ((rows["side"] == side) & (rows["loss_mask"] == 1)).sum(axis=1).astype(np.float64)


class Report:
    """The table's rows and the plot's curves."""

    def __init__(self) -> None:
        self.body: list[list[str]] = []
        self.curves: dict[str, list[tuple[float, float]]] = {}

    def add(self, study: Study, kind: str, data: str, name: str, rate: float, outcomes: list[Outcome]) -> None:
        own = self._samples([one.samples for one in outcomes])
        beside = compared([one.samples.remarks for one in outcomes], [one.remarks for one in study.begun])
        rest = [cell([getattr(one, what) for one in outcomes], 2) for what in ("slope", "correlation")]
        self.body.append([kind, data, name, f"{rate:g}", *own[:2], f"{own[2]} {beside}", own[3], *rest])
        say(" | ".join(self.body[-1]))
        if kind == PLAIN:
            tokens = [mean(study.looked_at), *np.mean([one.tokens for one in outcomes], axis=0)]
            steps = study.options.steps
            self.curves[f"{name}, {data}"] = [(steps * i / LOOKS, float(x)) for i, x in enumerate(tokens)]

    def add_start(self, study: Study, kind: str) -> None:
        self.body.append([kind, "", "start", "", *self._samples(study.begun), "", ""])

    def _samples(self, samples: list[Samples]) -> list[str]:
        digits = {"right": 3, "tokens": 1, "remarks": 2}
        shown = [cell([getattr(one, what) for one in samples], d) for what, d in digits.items()]
        return [*shown, f"{mean(one.truncated for one in samples):.3f}"]

    def __str__(self) -> str:
        head = ["remarks", "pairs", "loss", "learning rate", "right", "tokens", "remarks, beside the start", "cut off"]
        return table([*head, "nats a remark", "correlation with length"], self.body)


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=40)
    parser.add_argument("--rates", nargs="+", type=float, default=(3e-5, 1e-4, 3e-4))
    options = parser.parse_args()
    seeds, report, rates = range(options.seeds), Report(), {}
    for kind in REMARKS:
        study = Study(options, kind)
        report.add_start(study, kind)
        for name, loss in study.losses.items():
            aligner = Aligner(study.ground, loss, options.steps)
            if kind == PLAIN:
                found = {rate: [study.train(aligner, LONGER, rate, seed) for seed in seeds] for rate in options.rates}
                for rate, outcomes in found.items():
                    right, slope = ([getattr(one, what) for one in outcomes] for what in ("choosing", "slope"))
                    say(f"{name}, {rate:g}: right {cell(right)}, nats a remark {cell(slope)}")
                rates[name] = max(found, key=lambda rate: mean(one.choosing for one in found[rate]))
                report.add(study, kind, LONGER, name, rates[name], found[rates[name]])
            outcomes = [study.train(aligner, EQUAL, rates[name], seed) for seed in seeds]
            report.add(study, kind, EQUAL, name, rates[name], outcomes)
    report.body.sort(key=lambda row: (list(REMARKS).index(row[0]), ["", *PAIRS].index(row[1])))
    print(report)
    Path(options.svg).write_text(lines(report.curves, "training steps; tokens of a sample"))


if __name__ == "__main__":
    main()
