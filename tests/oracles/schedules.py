"""Makes tests/golden/schedules.json: learning rates of transformers' schedules over torch's optimizer, step by step.

Run with torch and transformers 5.23: `python tests/oracles/schedules.py`.
"""

import json
import pathlib

import torch
import transformers
from transformers import get_scheduler

PEAK = 3e-3
# Our fields beside transformers' name and arguments.
CASES = [
    ({"schedule": "constant"}, 20, "constant", {}),
    ({"schedule": "constant", "warmup_steps": 7}, 20, "constant_with_warmup", {}),
    ({"schedule": "cosine"}, 40, "cosine", {}),
    ({"schedule": "cosine", "warmup_steps": 10}, 60, "cosine", {}),
    ({"schedule": "cosine", "warmup_steps": 5, "final_fraction": 0.1}, 50, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ({"schedule": "linear", "warmup_steps": 1}, 30, "linear", {}),
    ({"schedule": "linear", "warmup_steps": 12}, 50, "linear", {}),
    (
        {"schedule": "wsd", "warmup_steps": 8, "decay_steps": 12},
        50,
        "warmup_stable_decay",
        {"num_decay_steps": 12, "decay_type": "linear"},
    ),
    (
        {"schedule": "wsd", "warmup_steps": 0, "decay_steps": 20, "final_fraction": 0.25},
        45,
        "warmup_stable_decay",
        {"num_decay_steps": 20, "decay_type": "linear", "min_lr_ratio": 0.25},
    ),
]


def rates(steps: int, warmup: int, name: str, arguments: dict) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    warm = None if name == "constant" else warmup
    scheduler = get_scheduler(name, optimizer, warm, steps, scheduler_specific_kwargs=arguments)
    out = []
    for _ in range(steps):
        out.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return out


def main() -> None:
    cases = [
        {"config": ours, "steps": steps, "rates": rates(steps, ours.get("warmup_steps", 0), name, arguments)}
        for ours, steps, name, arguments in CASES
    ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = pathlib.Path(__file__).parents[1] / "golden" / "schedules.json"
    path.write_text(json.dumps({"versions": versions, "peak": PEAK, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
