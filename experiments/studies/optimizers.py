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
COLOURS = {"adamw": "#4269d0", "lion": "#efb118", "adafactor": "#3ca951", "muon": "#ff725c", "sgd": "#9498a0"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 44, 96, 14, 34

Curve = list[tuple[int, float]]


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
    """All curves over one pair of axes, each named at its end."""
    steps = [step for _, curve in curves.values() for step, _ in curve]
    losses = [loss for _, curve in curves.values() for _, loss in curve]
    low, high = min(losses), max(losses)

    def x(step: float) -> float:
        return LEFT + step / max(steps) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / max(high - low, 1e-9) * (HEIGHT - TOP - BOTTOM)

    marks = []
    for i in range(5):
        loss, step = low + (high - low) * i / 4, max(steps) * i / 4
        marks.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        anchor = "end" if i == 4 else "middle"
        marks.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{step:g}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    marks.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step; held-out loss, nats per token</text>')
    below = float(HEIGHT)
    for rule, (rate, curve) in sorted(curves.items(), key=lambda item: item[1][1][-1][1]):
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        label = below = min(y(curve[-1][1]) + 4, below - 14)
        marks.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[rule]}" stroke-width="2"/>')
        marks.append(f'<text x="{WIDTH - RIGHT + 6}" y="{label:.1f}" fill="{COLOURS[rule]}">{rule} {rate:g}</text>')
    body = "\n".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#333">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


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
