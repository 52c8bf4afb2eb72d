"""A float32 AdamW training step on this CPU: ours, transformers + PyTorch (SDPA), the same under torch.compile.

    python experiments/benchmarks/train_step.py [--peer-python PYTHON_WITH_TRANSFORMERS] [--repeats 9]
        [--cases 6.8M:8x256,30M:8x256,6.8M:2x2048] [--compiled] [--handwritten]

`--handwritten` adds the same model in a jitted step written by hand: what the framework costs.
"""

import argparse
import sys

from sides import Side, compare, header, no_peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch and transformers")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cases", default="6.8M:8x256,30M:8x256,6.8M:2x2048")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as a third side")
    parser.add_argument("--handwritten", action="store_true", help="a hand-written JAX step as a further side")
    options = parser.parse_args()
    header()
    for case in options.cases.split(","):
        model, _, shape = case.partition(":")
        rows, length = map(int, shape.split("x"))
        task = {"task": "train_step", "model": model, "rows": rows, "length": length}
        sides = [Side("llm_jax", sys.executable, "ours.py", task)]
        if options.handwritten:
            sides.append(Side("hand-written", sys.executable, "ours.py", task | {"task": "handwritten"}))
        if options.peer_python:
            sides.append(Side("PyTorch", options.peer_python, "peer_torch.py", task | {"compiled": False}))
            if options.compiled:
                compiled = task | {"compiled": True}
                sides.append(Side("torch.compile", options.peer_python, "peer_torch.py", compiled))
        compare(case, rows * length, sides, options.repeats)
    if not options.peer_python:
        no_peer()


if __name__ == "__main__":
    main()
