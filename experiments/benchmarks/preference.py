"""Training steps on preferences on this CPU against TRL's: DPO, KTO and a reward model, the same setting on both sides.

    python experiments/benchmarks/preference.py [--peer-python PYTHON_WITH_TRL] [--repeats 9]
        [--model 6.8M] [--window 768] [--cases "DPO live;reward"]
        [--prompts 32 96] [--share-prompts]

16 pairs a step, for KTO as 32 answers with a label. The reference is a live copy, precomputed, or of an adapter (LoRA
on all linear layers) the model with the adapter off. TRL pads every answer to the longest of the batch; ours packs the
same answers into windows. Tokens are those of the answers with their prompts, once each, the same number on both sides:
what KTO's estimate of the KL reads besides is not counted. With `--share-prompts` ours computes a pair's prompt once
(`data.share_prompts`, which TRL has no counterpart of), to the same losses; tokens are counted as before.
"""

import argparse
import sys

import workload
from sides import Side, compare, header, no_peer

CASES = {
    "DPO live": {"task": "dpo", "reference": "live"},
    "DPO precomputed": {"task": "dpo", "reference": "stored"},
    "DPO LoRA, adapter off": {"task": "dpo", "reference": "adapter"},
    "reward": {"task": "reward"},
    "KTO live": {"task": "kto", "reference": "live"},
    "KTO precomputed": {"task": "kto", "reference": "stored"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch, transformers, peft and trl")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", default="6.8M", choices=workload.MODELS)
    parser.add_argument("--window", type=int, default=768)
    parser.add_argument("--prompts", type=int, nargs=2, default=[32, 96], help="least and most tokens of a prompt")
    parser.add_argument("--share-prompts", action="store_true", help="of the pairs of DPO and reward")
    parser.add_argument("--cases", default=";".join(CASES), help="names of the table's first column, with ; between")
    options = parser.parse_args()
    answers = workload.answers(options.model, options.prompts)
    tokens = sum(len(each["prompt_ids"]) + len(each["completion_ids"]) for each in answers)
    header()
    for case in options.cases.split(";"):
        task = CASES[case] | {"model": options.model, "prompts": options.prompts}
        ours = {"window": options.window} | ({} if task["task"] == "kto" else {"share": options.share_prompts})
        sides = [Side("llm_jax", sys.executable, "ours_preference.py", task | ours)]
        if options.peer_python:
            sides.append(Side("TRL", options.peer_python, "peer_trl.py", task))
        compare(case, tokens, sides, options.repeats)
    if not options.peer_python:
        no_peer()


if __name__ == "__main__":
    main()
