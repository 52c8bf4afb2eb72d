"""Measures tile sizes of an op's kernels on the device at hand: `python -m llm_jax.tune OP [options]`.

OP is flash_attention, linear_cross_entropy or another folder of `llm_jax/kernels` that has a `tuning.py`.

  --shape=heads=32,q_len=4096   sizes and options of the call; without it, and for the others, the op's own (printed)
  --implementation=NAME         gpu, tpu, xla; default: what the op takes on this device
  --dtype=NAME                  float32, bfloat16, float16; default bfloat16, on a CPU float32
  --repeats=N                   measurements of each candidate, in turn; their median counts (7)
  --write=FILE                  puts the best sizes into a table; LLM_JAX_TILES=FILE then makes kernels read it

Each candidate is compiled and its results are compared with those of the default sizes before it is timed.
"""

import sys

from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.flags import read_flags

FLAGS = {"--shape": "NAME=N,...", "--implementation": "NAME", "--dtype": "NAME", "--repeats": "N", "--write": "FILE"}


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        print((__doc__ or "").strip())
        return
    op, given, repeats = parse(argv)

    from llm_jax.jobs.tune import run

    run(
        op, given.get("--shape", ""), given.get("--implementation"), given.get("--dtype"), repeats, given.get("--write")
    )


def parse(argv: list[str]) -> tuple[str, dict[str, str], int]:
    """The op, flags and repeats. Raises UserError."""
    words, given, _ = read_flags(argv, FLAGS)
    if len(words) != 1:
        raise UserError(f"tune takes one op; it got {len(words)}, see --help")
    repeats = given.get("--repeats", "7")
    if not repeats.isdecimal() or int(repeats) < 1:
        raise UserError(f"--repeats={repeats}: it has to be a number of at least 1")
    return words[0], given, int(repeats)


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
