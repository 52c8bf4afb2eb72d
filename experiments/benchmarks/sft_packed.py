"""An SFT step on packed rows on this CPU against TRL's with packing=True (padding-free, SDPA): the same documents.

python experiments/benchmarks/sft_packed.py [--peer-python PYTHON_WITH_TRL] [--repeats 9] [--cases 6.8M:8x256]
"""

import argparse
import sys

from sides import Side, compare, header, no_peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch, transformers and trl")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cases", default="6.8M:8x256")
    options = parser.parse_args()
    header()
    for case in options.cases.split(","):
        model, _, shape = case.partition(":")
        rows, length = map(int, shape.split("x"))
        task = {"task": "sft_packed", "model": model, "rows": rows, "length": length}
        sides = [Side("llm_jax", sys.executable, "ours.py", task)]
        if options.peer_python:
            sides.append(Side("TRL", options.peer_python, "peer_torch.py", task))
        compare(case, rows * length, sides, options.repeats)
    if not options.peer_python:
        no_peer()


if __name__ == "__main__":
    main()
