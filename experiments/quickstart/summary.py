"""Prints what `make quickstart` made: the base model beside n-gram models, then right answers from stage to stage.

    python experiments/quickstart/summary.py [configs/dpo.py]

Reads the finished runs' metrics.jsonl and samples.jsonl; nothing is computed here.
"""

import json
import shlex
import sys

from llm_jax.base.door import run_door
from llm_jax.jobs.graph import Node, resolve
from llm_jax.training.metrics import last_values


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned: the first to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + row[0].ljust(widths[0]) + "".join(f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    )


def proposal(workdir: object, prompt: str) -> str:
    """The command that asks the trained model: greedily, as the evaluation above it did."""
    return f"python -m llm_jax.generate {workdir} --temperature 0 --prompt {shlex.quote(prompt)}"


def main(argv: list[str]) -> None:
    dpo = resolve(argv[0] if argv else "configs/dpo.py")
    sft = dpo.parents["init_from"]
    assert isinstance(sft, Node)
    base = sft.parents["init_from"]
    assert isinstance(base, Node)
    stages = {"base": base, "SFT": sft, "DPO": dpo}
    metrics = {name: last_values(node.workdir.metrics) for name, node in stages.items()}

    print("\nHeld-out text, nats per byte (lower is better)")
    names = {
        "unigram": "eval_unigram_nats_per_byte",
        "interpolated bigram": "eval_bigram_nats_per_byte",
        "base model": "eval_nats_per_byte",
    }
    print(table([(label, f"{metrics['base'][key]:.3f}") for label, key in names.items()]))

    steps = sorted(key for key in metrics["DPO"] if key.startswith("eval_exact_match/"))
    heading = ("", *stages)
    rows = [("right answers", "eval_exact_match"), ("answers that show their steps", "eval_careful")]
    rows += [(f"right, {key.removeprefix('eval_exact_match/').replace('_', ' ')}", key) for key in steps]
    print("\nHeld-out word problems, answered greedily (share)")
    body = [(label, *(f"{metrics[stage].get(key, float('nan')):.3f}" for stage in stages)) for label, key in rows]
    print(table([heading, *body]))
    print(f"\nReward accuracy on held-out pairs: {metrics['DPO']['eval_rewards/accuracies']:.3f}")

    print("\nSamples, before DPO and after")
    for line in dpo.workdir.samples.read_text().splitlines()[:3]:
        sample = json.loads(line)
        print(f"\n  {sample['prompt']}\n    before: {sample['before']}\n    after:  {sample['after']}")

    print(f"\nReport: {dpo.workdir}/report.html (and one in each of {base.workdir}, {sft.workdir})")
    print("Next:")
    print(f"  .venv/bin/{proposal(dpo.workdir, sample['prompt'])}")
    print("  .venv/bin/python -m llm_jax.show_data configs/dpo.py")
    print("  .venv/bin/python -m llm_jax.main --config=configs/sft.py --help")


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
