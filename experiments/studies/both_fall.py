"""DPO on nearly equal pairs: chosen and rejected answers fall together, and so does exact match. What changes that?

    python experiments/studies/both_fall.py [--seeds 3] [--steps 40] [--rates 1e-5 3e-5 1e-4 3e-4]

A pair is the careful solution of a word problem, and the same with one digit of one equation's result changed. Up to
that digit both are equal, so DPO's gradient there is 0; at the digit it asks for the right one; and behind it there are
equal tokens again, which it wants likelier after the right digit and less likely after the wrong one. A network that
hardly tells the two contexts apart, and is surer of such a token after the right digit, widens the margin by lowering
its logit in both (Pal et al. 2024, arXiv:2402.13228, section 3). Every change of a log-probability is therefore given
before, at and behind the digit.

Arms: DPO with three beta; RPO (DPO and the chosen answer's likelihood); DPO-positive; Step-DPO, the same pairs as one
step each, with what stands before it masked and nothing behind it; and the likelihood of the chosen answers alone. Each
trains every seed's own first policy at every rate, so that smaller steps are seen beside other losses. One of the rates
is each loss's choice, by exact match on other problems than those reported.

Prints two Markdown tables by loss and rate: log-probabilities on held-out pairs, means over the seeds; and exact match,
its difference to the start and to DPO at the same rate with the 95% interval of a bootstrap over problems, and which
rate is the chosen one. The plot has exact match by rate.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Rows, cell, make_parser, mean, say, table
from loops import difference
from plot import lines
from small_policies import Aligner, Answers, Ground, Params, Size, in_batches, problems

from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded.problems import Problem
from llm_jax.data.embedded.stepwise import right_steps
from llm_jax.data.examples import Pair
from llm_jax.data.stepwise import StepPair
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.scoring import score_rows
from llm_jax.models import Decoder, bind

WHERE = ("before", "at", "behind")


@dataclass(frozen=True)
class Arm:
    loss: PreferenceConfig
    steps_alone: bool = False
    """Pairs of one step each."""


def dpo(beta: float) -> PreferenceConfig:
    return PreferenceConfig(loss_type="sigmoid", beta=beta)


DPO = "DPO"
ARMS = {
    DPO: Arm(dpo(0.1)),
    "DPO, beta 0.02": Arm(dpo(0.02)),
    "DPO, beta 0.5": Arm(dpo(0.5)),
    "RPO": Arm(PreferenceConfig(loss_type="rpo", beta=0.1)),
    "DPO-positive": Arm(PreferenceConfig(loss_type="dpop", beta=0.1)),
    "Step-DPO": Arm(dpo(0.1), steps_alone=True),
    "likelihood of the chosen": Arm(PreferenceConfig(loss_type="sft", reference_logps="none")),
}


def digit_pairs(shown: list[Problem]) -> Iterator[tuple[Pair, StepPair]]:
    """Of each problem its solution over one with another digit, whole, and as the step that has it."""
    chance = random.Random("digits")
    for problem in shown:
        steps = right_steps(problem)
        at = chance.randrange(len(problem.steps))
        right = steps[at]  # It ends in the digit and a full stop.
        digit = chance.choice([d for d in "0123456789" if d != right[-2]])
        wrong = f"{right[:-2]}{digit}."
        asked, before, behind = problem.prompt + "\n", "".join(steps[:at]), "".join(steps[at + 1 :])
        yield Pair(asked, before + right + behind, before + wrong + behind), StepPair(asked, before, right, wrong)


@partial(jax.jit, static_argnums=0)
def token_logps(decoder: Decoder, params: Params, rows: Any) -> dict[str, jax.Array]:
    """Each answer token's log-probability at its own place, float32[B, T]; 0 elsewhere."""
    scores, mask = score_rows(bind(decoder, params), rows, ("logps",))
    return {"logps": jax.numpy.where(mask, scores["logps"], 0), "mask": mask}


def by_place(ground: Ground, params: Params, rows: Rows) -> dict[str, np.ndarray]:
    """`chosen` and `rejected`: sums of log-probabilities before, at and behind the digit in which the answers differ.

    float64[pairs, 3] each, nats.
    """
    said = in_batches(partial(token_logps, ground.decoder, params), rows)
    found: dict[str, list[Any]] = {"chosen": [], "rejected": []}
    for tokens, side, logps, mask in zip(rows["tokens"], rows["side"], said["logps"], said["mask"], strict=True):
        # Position t says how likely token t + 1 is.
        spans = [np.flatnonzero(mask & (side == which)) for which in (1, 2)]
        answers = [tokens[span + 1] for span in spans]
        (at,) = np.flatnonzero(answers[0] != answers[1])
        for name, span in zip(found, spans, strict=True):
            parts = np.split(logps[span].astype(np.float64), [at, at + 1])
            found[name].append([part.sum() for part in parts])
    return {name: np.array(sums) for name, sums in found.items()}


@dataclass(frozen=True)
class Outcome:
    chosen: np.ndarray
    """float64[pairs, 3]: changes of log-probability, nats."""
    rejected: np.ndarray
    chosen_on: float
    """Exact match on the problems by which a rate is chosen."""
    correct: np.ndarray
    """bool[problems]: on those that are reported."""

    @property
    def both_fall(self) -> float:
        """Share of pairs of which both answers are less likely than before."""
        return float(((self.chosen.sum(1) < 0) & (self.rejected.sum(1) < 0)).mean())

    @property
    def accuracy(self) -> float:
        return float((self.chosen.sum(1) > self.rejected.sum(1)).mean())


class Study:
    def __init__(self, options: argparse.Namespace):
        small = options.scale == "test"
        self.options = options
        config = EmbeddedConfig(max_number=12, min_operations=2, max_operations=3)
        size = Size(width=32, layers=1, demonstrations=500, steps=4) if small else Size()
        self.ground = Ground(config, lambda problem, chance: problem.careful, size)
        counts = (16, 4, 4, 4) if small else (640, 256, 300, 500)
        train, pairs, choosing, reported = (
            problems(config, name, count, "train" if name == "train" else "eval")
            for name, count in zip(("train", "pairs", "choosing", "reported"), counts, strict=True)
        )
        self.choosing, self.reported = choosing, reported
        whole, steps = zip(*digit_pairs(train), strict=True)
        self.rows = {False: self.ground.pairs(whole), True: self.ground.pairs(steps)}
        self.held_out = self.ground.pairs(pair for pair, _ in digit_pairs(pairs))
        self.starts = [self.ground.start(seed) for seed in range(options.seeds)]
        self.answers = Answers(self.ground, self.starts[0])
        self.before = [by_place(self.ground, start, self.held_out) for start in self.starts]

    def outcome(self, params: Params, seed: int) -> Outcome:
        after = by_place(self.ground, params, self.held_out)
        moved = {name: sums - self.before[seed][name] for name, sums in after.items()}
        chosen_on, correct = (self.answers.exact_match(params, some) for some in (self.choosing, self.reported))
        return Outcome(**moved, chosen_on=float(chosen_on.mean()), correct=correct)

    def arm(self, name: str) -> dict[float, list[Outcome]]:
        """By rate, the seeds."""
        arm, found = ARMS[name], {}
        aligner = Aligner(self.ground, preference_loss(arm.loss), self.options.steps)
        for rate in self.options.rates:
            found[rate] = [
                self.outcome(aligner(start, self.rows[arm.steps_alone], rate, seed), seed)
                for seed, start in enumerate(self.starts)
            ]
            say(f"{name}, {rate:g}: {cell([one.correct.mean() for one in found[rate]])}")
        return found


def signed(values: Any) -> str:
    return f"{mean(map(float, values)):+.2f}"


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=40)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="of these alone")
    parser.add_argument("--rates", nargs="+", type=float, default=(1e-5, 3e-5, 1e-4, 3e-4))
    options = parser.parse_args()
    study = Study(options)
    begun = [study.outcome(start, seed) for seed, start in enumerate(study.starts)]
    at_start = np.stack([one.correct for one in begun])
    shares = list(map(float, at_start.mean(axis=1)))
    say(f"start: {cell(shares)}")
    moves, ends = [], [["start", "", cell(shares), "", "", ""]]
    curves = {"start": [(float(rate), float(at_start.mean())) for rate in options.rates]}
    of_dpo: dict[float, np.ndarray] = {}
    for name in options.arms:
        found = study.arm(name)
        chosen = max(found, key=lambda rate: mean(one.chosen_on for one in found[rate]))
        for rate, seeds in found.items():
            places = [
                " / ".join(signed(getattr(one, side)[:, i].mean() for one in seeds) for i in range(len(WHERE)))
                for side in ("chosen", "rejected")
            ]
            sums = [signed(getattr(one, side).sum(1).mean() for one in seeds) for side in ("chosen", "rejected")]
            shares = [f"{mean(getattr(one, what) for one in seeds):.2f}" for what in ("both_fall", "accuracy")]
            moves.append([name, f"{rate:g}", sums[0], places[0], sums[1], places[1], *shares])
            correct = np.stack([one.correct for one in seeds])
            if name == DPO:
                of_dpo[rate] = correct
            beside = difference(correct, of_dpo[rate]) if of_dpo and name != DPO else ""
            exact = cell(list(map(float, correct.mean(axis=1))))
            taken = "chosen" if rate == chosen else ""
            ends.append([name, f"{rate:g}", exact, difference(correct, at_start), beside, taken])
        curves[name] = [(rate, mean(one.correct.mean() for one in seeds)) for rate, seeds in found.items()]
    of_digit = f"{' / '.join(WHERE)} the digit"
    head = ["loss", "learning rate", "chosen, nats", of_digit, "rejected, nats", of_digit, "both fall", "margin > 0"]
    print(table(head, moves) + "\n")
    print(table(["loss", "learning rate", "exact match", "beside the start", f"beside {DPO}, same rate", "rate"], ends))
    Path(options.svg).write_text(lines(curves, "learning rate; exact match on held-out problems", log_x=True))


if __name__ == "__main__":
    main()
