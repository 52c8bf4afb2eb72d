"""Shows a batch as the model will see it: `python -m llm_jax.show_data CONFIG [--config.a.b=value ...]`.

Targets of the loss are green, the rest is dim, segments and padding are marked; without a terminal (or with NO_COLOR)
targets stand in ⟦ ⟧. Builds the config's data, and its tokenizer where that is trained, but trains no model.

  --split=train|eval   which rows (train)
  --step=N             which batch (0)
  --rows=N             at most so many rows of it (8)
  --workdir=DIR        instead of runs/NAME-HASH
"""

import os
import sys

from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.nearest import nearest

OPTIONS = {"--split": "train", "--step": "0", "--rows": "8", "--workdir": ""}


def main(argv: list[str]) -> None:
    if not argv or {"--help", "-h"} & set(argv):
        print((__doc__ or "").strip())
        return
    print(_batch(*parse(argv)))


def parse(argv: list[str]) -> tuple[str, list[tuple[str, str]], dict[str, str]]:
    """The config, its overrides and the options; `--flag=value` and `--flag value` are the same. Raises UserError."""
    options, overrides, configs = dict(OPTIONS), [], []
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            configs.append(word)
            continue
        if not (name in OPTIONS or name == "--config" or name.startswith("--config.")):
            near = nearest(name, [*OPTIONS, "--config"])
            raise UserError(f"unknown argument {word}; " + (f"the nearest is {near}=..." if near else "see --help"))
        if not equals:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{name} needs a value: {name}=...")
        if name == "--config":
            configs.append(value)
        elif name in OPTIONS:
            options[name] = value
        else:
            overrides.append((name.removeprefix("--config."), value))
    if len(configs) != 1:
        raise UserError(f"show_data takes one config, FILE.py[:variant]; it got {len(configs)}")
    for name in ("--step", "--rows"):
        if not options[name].isdecimal():
            raise UserError(f"{name}={options[name]} has to be a whole number")
    if options["--split"] not in ("train", "eval"):
        raise UserError(f"--split={options['--split']} has to be train or eval")
    return configs[0], overrides, options


def _batch(config: str, overrides: list[tuple[str, str]], options: dict[str, str]) -> str:
    from llm_jax.data.loader import Loader
    from llm_jax.data.prepare import MANIFEST, open_rows
    from llm_jax.data.show import format_batch
    from llm_jax.data.tokenizers import load_tokenizer
    from llm_jax.jobs.graph import prepare
    from llm_jax.storage.remote import fetch, local_copy

    node = prepare(config, overrides, options["--workdir"] or None)
    if not (hasattr(node.config, "data") and hasattr(node.config, "train")):
        raise UserError(f"{config}: the job {node.job} reads no rows")
    folder = local_copy(node.workdir.data, node.hash)
    fetch(node.workdir.data, folder, MANIFEST)
    rowset = open_rows(folder, "train" if options["--split"] == "train" else "eval")
    train = node.config.train
    shuffle = options["--split"] == "train"
    loader = Loader(rowset, train.batch_size, seed=train.seed, shuffle=shuffle)
    # Shuffled rows come again in every epoch, as long as the run goes on.
    step, count = int(options["--step"]), train.steps if shuffle else len(loader)
    if step >= count:
        raise UserError(f"--step={step}: {options['--split']} has {count} batches, from 0 to {count - 1}")
    batch = {name: array[:, : int(options["--rows"])] for name, array in loader.batch(step).items()}
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return format_batch(batch, load_tokenizer(node.workdir.tokenizer), color, rowset.manifest["sources"])


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
