"""What sampling loops make of one SFT model, with the same budget of samples each: exact match on held-out problems.

    python experiments/studies/loops.py [--arms "iterative DPO" SPO ...] [--seeds 3] [--rounds 3] [--runs FOLDER]

The start is fine-tuned on problems harder than those of configs/sft.py, so that it gets some of them right and most of
them wrong. Of `--start mixed` half of the demonstrations show their steps and half guess, and greedy decoding does the
one or the other; of `careful` all do, fine-tuning ends early, and what is wrong is arithmetic. Every arm draws
`--samples` answers from it and from what becomes of it, and takes `--steps` training steps: all at once (offline DPO,
whose pairs are all the start's), or dealt out over the rounds. Seeds change samples and the order of rows. Each arm has
the best of --rates for it by its first seed, on held-out problems that are not reported.

Prints two Markdown tables. Exact match over the seeds, and its difference to the start and to offline DPO with the 95%
interval of a bootstrap over problems (paired: the same problems for both sides, and the mean over the seeds of each);
and the same by the operations that a problem needs, beside offline DPO. The plot has exact match by tokens drawn. Runs
are kept in --runs, and one that is there, or half there, goes on; minutes are those of the process that first came to
its end.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import cell, make_parser, mean, say, table
from plot import lines

from llm_jax.base.door import run_door
from llm_jax.main import main as train

CONFIGS = Path(__file__).parents[2] / "configs"
RATES = (1e-5, 5e-5)
HARDER = {"data.generated.max_number": 30, "data.generated.min_operations": 2, "data.generated.max_operations": 4}
STARTS = {
    "mixed": {"data.generated.careful_fraction": 0.55, "train.steps": 800},
    "careful": {"data.generated.careful_fraction": 1.0, "train.steps": 350},
}
OFFLINE = "offline DPO"


@dataclass(frozen=True)
class Arm:
    """A config, its test variant, and what differs from the others."""

    config: str
    test: str | None = "test"
    """None: it has nothing to do at that size."""
    variant: str = ""
    cost: float = 8
    """Whole answers that a prompt takes, about; what was drawn is in the table."""
    once: bool = False
    """All prompts in one round."""
    fields: dict[str, Any] = field(default_factory=dict)


ARMS = {
    OFFLINE: Arm("iterative_dpo.py", once=True),
    "Step-DPO": Arm("step_dpo.py", test=None, cost=20, once=True),
    "iterative DPO": Arm("iterative_dpo.py"),
    "iterative RPO": Arm("iterative_dpo.py", variant="rpo", test="rpo_test"),
    "MCTS-DPO": Arm("mcts_dpo.py", test=None, cost=40, fields={"sampling.max_tokens": 32}),
    "SPO": Arm("spo.py"),
    "SPPO": Arm("sppo.py", cost=5),
    "SPIN": Arm("spin.py", cost=1),
}


@dataclass(frozen=True)
class Run:
    """What one run came to."""

    tokens: list[int]
    """Drawn until the end of each round; 0 first."""
    samples: int
    choosing: float
    """Exact match on the problems that choose the rate, in the end."""
    correct: np.ndarray
    """bool[rounds + 1, problems]: before the first round and after each, on the problems that are reported."""
    operations: np.ndarray
    """int[problems]: how many each needs."""
    pairs: int
    minutes: float


def make(workdir: Path, config: str, fields: dict[str, Any]) -> None:
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    status = run_door(train, [f"--config={CONFIGS / config}", f"--workdir={workdir}", *flags])
    if status:
        raise SystemExit(status)


def start(options: argparse.Namespace) -> Path:
    """The model that all arms begin with."""
    base, sft = Path(options.runs) / "base", Path(options.runs) / f"{options.start}-sft"
    small = options.scale == "test"
    harder: dict[str, Any] = {} if small else HARDER
    make(base, "pretrain.py:test" if small else "pretrain.py", harder | {"task_eval.problems": 0, "mesh.data": 1})
    fields = harder | {"init_from": base, "task_eval.problems": 0, "mesh.data": 1}
    make(sft, "sft.py:test" if small else "sft.py", fields if small else fields | STARTS[options.start])
    return sft


def run(options: argparse.Namespace, name: str, rate: float, seed: int) -> Run:
    arm, small = ARMS[name], options.scale == "test"
    rounds = 1 if arm.once else options.rounds
    fields: dict[str, Any] = {
        "init_from": start(options),
        "rounds": rounds,
        "seed": seed,
        "preference.train.seed": seed,
        "preference.train.optimizer.learning_rate": rate,
        "mesh.data": 1,
    }
    if not small:
        fields |= HARDER | {
            "prompts_per_round": round(options.samples / arm.cost / rounds),
            "sampling.max_tokens": 96,
            "preference.train.steps": options.steps // rounds,
            "preference.train.optimizer.warmup_steps": max(1, options.steps // rounds // 10),
            "preference.train.checkpoint.every": options.steps,
            "data.generated.eval_records": options.choosing + options.problems,
            "task_eval.problems": options.choosing + options.problems,
            "task_eval.max_tokens": 96,
        }
    variant = arm.test if small else arm.variant
    workdir = Path(options.runs) / f"{options.start}-{name.replace(' ', '_')}-{rate:g}-{seed}"
    began = time.monotonic()
    make(workdir, f"{arm.config}:{variant}" if variant else arm.config, fields | arm.fields)
    minutes = (time.monotonic() - began) / 60
    timed = workdir / "minutes.json"
    if not timed.exists():
        timed.write_text(json.dumps(minutes))
    return read_run(workdir, rounds, 1 if small else options.choosing, json.loads(timed.read_text()))


def read_run(workdir: Path, rounds: int, choosing: int, minutes: float) -> Run:
    """From the files of a run of the job `rounds`; the first `choosing` problems are not reported."""
    told = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    tokens = np.cumsum([line.get("pairs/tokens", 0) for line in told]).astype(int).tolist()
    correct = []
    for number in range(rounds + 1):
        answers = json.loads((workdir / "rounds" / f"{number:02d}" / "eval.json").read_text())["answers"]
        correct.append([answer["correct"] for answer in answers])
    operations = [answer["steps"] for answer in answers]
    samples, pairs = (int(sum(line.get(f"pairs/{name}", 0) for line in told)) for name in ("samples", "pairs"))
    chosen_on, reported = np.split(np.array(correct), [choosing], axis=1)
    return Run(tokens, samples, chosen_on[-1].mean(), reported, np.array(operations)[choosing:], pairs, minutes)


def paired_interval(ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """The difference of two arms' exact match, and between what 95% of it lies under a bootstrap over problems.

    Args:
      ours, theirs: bool[seeds, problems], the same problems in the same order; each is averaged over its seeds.
    """
    differences = ours.mean(axis=0) - theirs.mean(axis=0)
    chance, count = np.random.default_rng(0), len(differences)
    low, high = np.quantile(
        [differences[chance.integers(count, size=count)].mean() for _ in range(draws)], [0.025, 0.975]
    )
    return float(differences.mean()), float(low), float(high)


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    middle, low, high = paired_interval(ours, theirs)
    sign = "above" if low > 0 else "below" if high < 0 else "no difference"
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f}) {sign}"


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=45)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=None, help="of these alone")
    parser.add_argument("--start", choices=list(STARTS), default="mixed")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4608, help="answers drawn by each arm for one seed")
    parser.add_argument("--problems", type=int, default=500, help="held-out problems that are reported")
    parser.add_argument("--choosing", type=int, default=100, help="held-out problems that choose the learning rate")
    parser.add_argument("--runs", default=None, help="folder for the runs; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.runs = options.runs or temporary
        study(options)


def found_by(options: argparse.Namespace, name: str) -> tuple[float, list[Run]]:
    """The rate that is best for an arm, and its runs with it, a seed each."""
    first = {rate: run(options, name, rate, 0) for rate in options.rates}
    for rate, one in first.items():
        right = f"{one.choosing:.3f} where rates are chosen, {one.correct[-1].mean():.3f} where not"
        say(f"{name}, rate {rate:g}, seed 0: {right}; {one.minutes:.1f} minutes")
    rate = max(first, key=lambda rate: first[rate].choosing)
    return rate, [first[rate], *(run(options, name, rate, seed) for seed in range(1, options.seeds))]


def study(options: argparse.Namespace) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    ends: dict[str, np.ndarray] = {}
    body = []
    at_size = [name for name, arm in ARMS.items() if arm.test is not None or options.scale == "full"]
    for name in options.arms or at_size:
        rate, found = found_by(options, name)
        ends[name] = np.stack([one.correct[-1] for one in found])
        begun, operations = found[0].correct[:1], found[0].operations
        looks = zip(found[0].tokens, np.mean([one.correct.mean(axis=1) for one in found], axis=0), strict=True)
        curves[name] = [(float(tokens), float(value)) for tokens, value in looks]
        if not body:
            body.append(["SFT (start)", "", 0, 0, 0, f"{begun.mean():.3f}", "", "", ""])
        beside = difference(ends[name], ends[OFFLINE]) if OFFLINE in ends and name != OFFLINE else ""
        drawn = [round(mean(getattr(one, name) for one in found)) for name in ("samples", "pairs")]
        drawn.insert(1, round(mean(one.tokens[-1] for one in found)))
        exact = cell([one.correct[-1].mean() for one in found])
        minutes = f"{sum(one.minutes for one in found):.1f}"
        body.append([name, f"{rate:g}", *drawn, exact, difference(ends[name], begun), beside, minutes])
        say(" | ".join(map(str, body[-1])))
    Path(options.svg).write_text(lines(curves, "tokens drawn; exact match on held-out problems"))
    head = ["method", "learning rate", "samples", "tokens", "pairs", "exact match", "beside SFT", f"beside {OFFLINE}"]
    head.append("minutes")
    print(table(head, body))
    print("", by_operations(ends, begun, operations), sep="\n")


def by_operations(ends: dict[str, np.ndarray], begun: np.ndarray, operations: np.ndarray) -> str:
    """A table of exact match by how many operations a problem needs, beside offline DPO where that was run."""
    counts = sorted(set(operations.tolist()))
    head = ["method", *(f"{count} operations ({np.sum(operations == count)} problems)" for count in counts)]
    body = []
    for name, correct in {"SFT (start)": begun, **ends}.items():
        row = []
        for count in counts:
            which = operations == count
            beside = name != OFFLINE and OFFLINE in ends
            said = f"; {difference(correct[:, which], ends[OFFLINE][:, which])}" if beside else ""
            row.append(f"{correct[:, which].mean():.3f}{said}")
        body.append([name, *row])
    return table(head, body)


if __name__ == "__main__":
    main()
