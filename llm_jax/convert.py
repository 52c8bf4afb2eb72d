"""`python -m llm_jax.convert SRC DST`: a Hugging Face folder to a native one, and back."""

import sys

from llm_jax.base.door import run_door

USAGE = """usage: python -m llm_jax.convert SRC DST

SRC a Hugging Face folder  -> DST a native folder (checkpoints, tokenizer, architecture)
SRC a native folder or a workdir -> DST a Hugging Face folder (config.json, safetensors, tokenizer)

Which one SRC is, is recognised. DST must be empty or absent.
Tensors keep their values and, going back, their dtypes."""


def main(args: list[str]) -> None:
    if args in (["--help"], ["-h"]):
        print(USAGE)
        return
    from llm_jax.base.errors import UserError

    if len(args) != 2:
        raise UserError(f"convert takes SRC and DST, not {len(args)} arguments (see --help)")

    from llm_jax.storage.remote import to_path

    source, target = map(to_path, args)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty")

    from llm_jax.models.loading import load, read_hf_config, save, save_native

    native = read_hf_config(source) is None
    model = load(source)
    (save if native else save_native)(model, target)
    print(f"wrote {target} ({'Hugging Face' if native else 'native'} layout)")


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
