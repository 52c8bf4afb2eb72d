"""Measures tile sizes of an op's kernels on the device at hand: `python -m llm_jax.tune OP [options]`.

OP is flash_attention, linear_cross_entropy or another folder of `llm_jax/kernels` that has a `tuning.py`.

  --shape=heads=32,q_len=4096   sizes and options of the call; without it, and for the others, the op's own (printed)
  --implementation=NAME         gpu, tpu, xla; default: what the op takes on this device
  --dtype=NAME                  float32, bfloat16, float16; default bfloat16, on a CPU float32
  --repeats=N                   measurements of each candidate, in turn; their median counts (7)
  --patience=SECONDS            how long a candidate may take to compile, to be checked or to be measured (300)
  --write=FILE                  puts the best sizes into a table; LLM_JAX_TILES=FILE then makes kernels read it

Each candidate is compiled and its results are compared with those of the default sizes before it is timed. One that
hangs or breaks its process is left out, and another process tries the others.
"""

import sys
import tempfile
from pathlib import Path

from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.flags import read_flags
from llm_jax.base.journal import Journal, run_all

FLAGS = {
    "--shape": "NAME=N,...",
    "--implementation": "NAME",
    "--dtype": "NAME",
    "--repeats": "N",
    "--patience": "SECONDS",
    "--write": "FILE",
    "--journal": "FILE",  # of the processes that do the work
}


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        print((__doc__ or "").strip())
        return
    op, given, repeats, patience = parse(argv)
    if "--journal" not in given:
        with tempfile.TemporaryDirectory() as folder:
            status = run_all([sys.executable, "-m", "llm_jax.tune", *argv], Path(folder, "journal"))
        if status:
            sys.exit(status)
        return

    from llm_jax.jobs.tune import run

    shape, implementation, dtype = given.get("--shape", ""), given.get("--implementation"), given.get("--dtype")
    journal = Journal(Path(given["--journal"]), patience)
    with journal.whole():
        run(op, shape, implementation, dtype, repeats, given.get("--write"), journal)


def parse(argv: list[str]) -> tuple[str, dict[str, str], int, int]:
    """The op, flags, repeats and patience. Raises UserError."""
    words, given, _ = read_flags(argv, FLAGS)
    if len(words) != 1:
        raise UserError(f"tune takes one op; it got {len(words)}, see --help")
    numbers = {"--repeats": "7", "--patience": "300"} | given
    for flag in ("--repeats", "--patience"):
        if not numbers[flag].isdecimal() or int(numbers[flag]) < 1:
            raise UserError(f"{flag}={numbers[flag]}: it has to be a number of at least 1")
    return words[0], given, int(numbers["--repeats"]), int(numbers["--patience"])


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
