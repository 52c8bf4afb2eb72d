"""What a model is made of and what it takes: `python -m llm_jax.describe MODEL|CONFIG [options]`.

MODEL is a Hugging Face folder (config.json is enough), a native folder or a workdir; CONFIG is FILE.py[:variant].
Shows layers and what each sees, parameters by part and those that a token uses, flops per token, bytes of cache and
state per token and at a length, and a training step's memory per device.

  --mesh=data=8,tensor=2,zero=3   devices and ZeRO stage (a config's own; else one device)
  --dtype=float32|bfloat16        of computation and of the cache
  --batch=N                       rows of a batch, and sequences in the cache
  --window=N                      tokens of a row
  --microbatches=N                pieces of a batch
  --remat=none|full|dots          what the backward pass makes again
  --platform=cpu|gpu|tpu          decides which kernels are counted on (tpu)
  --json                          numbers for programs
  --config.a.b=value              any field of a CONFIG
"""

import dataclasses
import json
import os
import sys

from llm_jax.base.config import apply_overrides, bind
from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.flags import read_flags

OPTIONS = ("--mesh", "--dtype", "--batch", "--window", "--microbatches", "--remat", "--platform")
FIELDS = {"dtype": "compute_dtype", "batch": "batch_size", "microbatches": "microbatches", "remat": "remat"}
"""Options that stand for a field of TrainConfig."""
PLATFORMS = ("cpu", "gpu", "tpu")


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        print((__doc__ or "").strip())
        return
    reference, options, overrides, as_json = parse(argv)
    # Shapes only: an accelerator, whoever is at work on it, is left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"

    from llm_jax.jobs.describe import describe, read_setting
    from llm_jax.jobs.describe_text import text

    setting = changed(read_setting(reference, overrides), options)
    described = describe(setting, platform=options.get("platform", "tpu"))
    print(json.dumps(described, indent=1) if as_json else text(described))


def parse(argv: list[str]) -> tuple[str, dict[str, str], list[tuple[str, str]], bool]:
    """The model, options, overrides of a config, and whether JSON is asked for. Raises UserError."""
    references, given, overrides = read_flags(argv, dict.fromkeys(OPTIONS, "..."), ("--json",), overrides=True)
    options = {flag.removeprefix("--"): value for flag, value in given.items() if flag in OPTIONS}
    if len(references) != 1:
        raise UserError(f"describe takes one model or config; it got {len(references)}, see --help")
    if options.get("platform", "tpu") not in PLATFORMS:
        raise UserError(f"--platform={options['platform']} is not one of {', '.join(PLATFORMS)}")
    return references[0], options, overrides, "--json" in given


def changed(setting, options: dict[str, str]):
    """The setting with the command line's options in it. Raises UserError."""
    from llm_jax.sharding.config import MeshConfig
    from llm_jax.training.config import TrainConfig

    mesh = setting.mesh
    if "mesh" in options:
        pairs = [tuple(part.strip().split("=", 1)) for part in options["mesh"].split(",")]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"--mesh={options['mesh']} is not data=N,tensor=N,zero=N")
        mesh = _bound(MeshConfig, dataclasses.asdict(mesh), [(name, text) for name, text in pairs], "--mesh")
    train = setting.train
    for option, name in FIELDS.items():
        if option in options:
            value = getattr(_bound(TrainConfig, {}, [(name, options[option])], f"--{option}"), name)
            train = dataclasses.replace(train, **{name: value})
    window = setting.window
    if "window" in options:
        if not options["window"].isdecimal() or not int(options["window"]) > 0:
            raise UserError(f"--window={options['window']} has to be a positive number of tokens")
        window = int(options["window"])
    return dataclasses.replace(setting, mesh=mesh, train=train, window=window)


def _bound(cls: type, values: dict, given: list[tuple[str, str]], flag: str):
    try:
        return bind(cls, apply_overrides(values, given, cls))
    except UserError as error:
        raise UserError(f"{flag}: {str(error).removeprefix('config.')}") from None


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
