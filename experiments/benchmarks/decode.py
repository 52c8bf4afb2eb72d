"""Greedy decoding on this machine's CPU: ours against `transformers.generate`, float32, key-value cache on.

    python experiments/benchmarks/decode.py [--peer-python PYTHON_WITH_TRANSFORMERS] [--repeats 7]

A Llama of 6.8M parameters (`workload.MODELS`), random weights, the same on both sides; 128 tokens of prompt, 128 new
ones, at batch 1 and 16. A run is a whole call, from lists of ids to lists of ids, prefill included; each side runs once
before it is timed (compilation). Prints how many tokens are the same on both sides.
"""

import argparse
import json
import subprocess
import sys
import tempfile

from decode_worker import NEW
from sides import HERE, Side, alternate, no_peer, quartiles

BATCHES = (1, 16)
WORKER = str(HERE / "decode_worker.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch and transformers")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print("| batch | side | median s | quartiles | new tokens/s | peak MiB | same tokens | ours is faster by |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: this one forks, which JAX's threads would not survive.
        subprocess.run([sys.executable, WORKER, json.dumps({"side": "save", "folder": folder})], check=True)
        for batch in BATCHES:
            pythons = {"llm_jax": sys.executable} | (
                {"transformers": options.peer_python} if options.peer_python else {}
            )
            sides = [
                Side(name, python, "decode_worker.py", {"side": name, "folder": folder, "batch": batch})
                for name, python in pythons.items()
            ]
            alternate(sides, options.repeats)
            ours = sides[0]
            for side in sides:
                low, median, high = quartiles(side.seconds)
                equal = [a == b for x, y in zip(ours.results[0], side.results[0]) for a, b in zip(x, y)]
                same = "" if side is ours else f"{sum(equal)} of {len(equal)}"
                ratio = "" if side is ours else f"{median / quartiles(ours.seconds)[1]:.2f}x"
                print(
                    f"| {batch} | {side.label} | {median:.3f} | {low:.3f} to {high:.3f} | {batch * NEW / median:,.0f} "
                    f"| {side.peak:,.0f} | {same} | {ratio} |",
                    flush=True,
                )
                side.stop()
    if not options.peer_python:
        no_peer()


if __name__ == "__main__":
    main()
