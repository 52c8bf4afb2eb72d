"""A DPO step on this CPU against TRL's: 16 pairs, the reference live on both sides, then precomputed on both.

    python experiments/benchmarks/preference.py [--peer-python PYTHON_WITH_TRL] [--repeats 9]
        [--model 6.8M] [--window 512]

TRL pads every answer to the longest of the batch; ours packs the same pairs into windows. Tokens are those of the
pairs, prompts once per answer.
"""

import argparse
import sys

import workload
from sides import Side, compare, header, no_peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch, transformers and trl")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", default="6.8M", choices=workload.MODELS)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    lengths = [{name: len(ids) for name, ids in pair.items()} for pair in workload.pairs(options.model)]
    tokens = sum(2 * n["prompt_ids"] + n["chosen_ids"] + n["rejected_ids"] for n in lengths)
    header()
    for live in (True, False):
        task = {"task": "preference", "model": options.model, "live": live}
        sides = [Side("llm_jax", sys.executable, "ours.py", task | {"length": options.window})]
        if options.peer_python:
            sides.append(Side("TRL", options.peer_python, "peer_torch.py", task))
        compare(f"reference {'live' if live else 'precomputed'}", tokens, sides, options.repeats)
    if not options.peer_python:
        no_peer()


if __name__ == "__main__":
    main()
