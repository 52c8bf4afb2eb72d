"""Every update rule on the same real text: held-out loss by step, in one plot and one table.

    python experiments/studies/optimizers.py TEXT [--steps 200] [--svg experiments/studies/optimizers.svg]

TEXT is a file or folder that `data.path` takes. Trains the model of configs/pretrain.py from the same random weights on
the same rows with each rule at each of its learning rates (linear warm-up over a tenth, then cosine to a tenth, decay
0.1), draws each rule's best, and prints a Markdown table of all. Runs are kept in --runs, and one that is there is not
run again.
"""

import argparse
import json
import tempfile
from pathlib import Path

from plot import Curve, lines

from llm_jax.base.door import run_door
from llm_jax.main import main as train

RATES = {
    "adamw": (2e-3, 4e-3, 8e-3),
    "lion": (1e-3, 3e-3, 1e-2),
    "adafactor": (0.05, 0.15, 0.4),
    "muon": (8e-3, 16e-3, 32e-3),
    "sgd": (0.1, 0.3, 1.0),
}
"""Muon's with match_rms_adamw, for its AdamW part too; Adafactor's are relative to the size of each parameter."""
CAPTION = "step; held-out loss, nats per token"


def held_out(arguments: argparse.Namespace, rule: str, rate: float) -> Curve:
    """(step, held-out loss) of one run."""
    workdir = Path(arguments.runs) / f"{rule}-{rate:g}"
    fields = {
        "data.path": arguments.text,
        "data.eval_fraction": 0.1,
        "train.steps": arguments.steps,
        "train.eval_every": max(1, arguments.steps // 10),
        "train.optimizer.rule": rule,
        "train.optimizer.learning_rate": rate,
        "train.optimizer.warmup_steps": arguments.steps // 10,
        "train.checkpoint.export": "false",
        "task_eval.problems": 0,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    status = run_door(train, [f"--config={arguments.config}", f"--workdir={workdir}", *flags])
    if status:
        raise SystemExit(status)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def svg(curves: dict[str, tuple[float, Curve]]) -> str:
    """Each rule's curve, named by its rate, the best one first."""
    best_first = sorted(curves.items(), key=lambda item: item[1][1][-1][1])
    return lines({f"{rule} {rate:g}": curve for rule, (rate, curve) in best_first}, CAPTION)


def main() -> None:
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", help="file or folder of text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--config", default=str(folder.parents[1] / "configs" / "pretrain.py"))
    parser.add_argument("--rules", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--svg", default=str(folder / "optimizers.svg"))
    parser.add_argument("--runs", default=None, help="folder for the runs; a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.runs = arguments.runs or temporary
        runs = {rule: {rate: held_out(arguments, rule, rate) for rate in RATES[rule]} for rule in arguments.rules}
    best = {rule: min(each.items(), key=lambda item: item[1][-1][1]) for rule, each in runs.items()}
    Path(arguments.svg).write_text(svg(best))
    print(f"| rule | held-out loss after {arguments.steps} steps, by learning rate |\n|---|---|")
    for rule, (rate, _) in sorted(best.items(), key=lambda item: item[1][1][-1][1]):
        cells = [
            f"{r:g}: {'**' * (r == rate)}{curve[-1][1]:.3f}{'**' * (r == rate)}" for r, curve in runs[rule].items()
        ]
        print(f"| {rule} | {' · '.join(cells)} |")


if __name__ == "__main__":
    main()
