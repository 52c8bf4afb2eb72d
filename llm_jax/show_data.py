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
    options, overrides, configs = dict(OPTIONS), [], []
    for word in argv:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            configs.append(word)
        elif not equals or not (name in OPTIONS or name.startswith("--config")):
            near = nearest(name, [*OPTIONS, "--config"])
            raise UserError(f"unknown argument {word}; " + (f"the nearest is {near}=..." if near else "see --help"))
        elif name == "--config":
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
    print(_batch(configs[0], overrides, options))


def _batch(config: str, overrides: list[tuple[str, str]], options: dict[str, str]) -> str:
    from llm_jax.data.loader import Loader
    from llm_jax.data.rowset import RowSet
    from llm_jax.data.show import format_batch
    from llm_jax.data.tokenizers import load_tokenizer
    from llm_jax.jobs.graph import prepare

    node = prepare(config, overrides, options["--workdir"] or None)
    if not hasattr(node.config, "data"):
        raise UserError(f"{config}: the job {node.job} reads no rows")
    rowset = RowSet(node.workdir.data / options["--split"])
    train = node.config.train
    loader = Loader(rowset, train.batch_size, seed=train.seed, shuffle=options["--split"] == "train")
    batch = {name: array[:, : int(options["--rows"])] for name, array in loader.batch(int(options["--step"])).items()}
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return format_batch(batch, load_tokenizer(node.workdir.tokenizer), color, rowset.manifest["sources"])


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
