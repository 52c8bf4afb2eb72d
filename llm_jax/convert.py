"""`python -m llm_jax.convert SRC DST`: a Hugging Face folder to a native one, and back."""

import re
import sys

from llm_jax.base.door import run_door

USAGE = """usage: python -m llm_jax.convert SRC DST [--dtype=float32|bfloat16|float16] [--kv-heads=G]
                                 [--experts=E [--top-k=K]] [--prefix-lm] [--verify]

SRC a Hugging Face folder  -> DST a native folder (checkpoints, tokenizer, architecture)
SRC a native folder or a workdir -> DST a Hugging Face folder (config.json, safetensors, tokenizer)
SRC an adapter (a PEFT folder, or the workdir of a run that trained one) -> the same, the adapter in its weights

Which one SRC is, is recognised. DST must be empty or absent, or what a conversion that was stopped has left.
Tensors keep their values and, going back, their dtypes, or get the one of --dtype.
The checksum is over names, dtypes, shapes and values: both layouts of one model have the same.
--kv-heads=G makes a model of G key and value heads, each the mean of those it stands for (then train on).
--experts=E makes a dense model's feed-forward layers E experts, K (2) to a token, all equal (then train on).
--prefix-lm makes a causal model one whose prompts see themselves from both sides (then train on).
--verify reads DST again and compares weights, logits (or scores) and greedy tokens of both."""

FLAGS = {"--dtype": "float32", "--kv-heads": "2", "--experts": "8", "--top-k": "2"}
WRITTEN = re.compile(
    r"[\w.-]+\.(safetensors|part|json|model|txt|jinja|new)|additional_chat_templates|checkpoints|tokenizer|lock"
)
"""Names of what a conversion writes."""


def main(args: list[str]) -> None:
    if {"--help", "-h"} & set(args):
        print(USAGE)
        return
    from llm_jax.base.errors import UserError
    from llm_jax.base.flags import read_flags

    words, given, _ = read_flags(args, FLAGS, ("--prefix-lm", "--verify"))
    if len(words) != 2:
        raise UserError(f"convert takes SRC and DST, not {len(words)} arguments (see --help)")

    from llm_jax.storage.remote import to_path
    from llm_jax.storage.unfinished import check_free, written

    source, target = map(to_path, words)
    check_free(target, WRITTEN)

    from llm_jax.adapters.loading import has_adapter, load_merged
    from llm_jax.models.hf_folders import FLOATS
    from llm_jax.models.loading import load, read_hf_config
    from llm_jax.models.saving import checksum, hf_contents, rounded, save, save_native

    dtype = given.get("--dtype")
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(FLOATS)}")
    for flag in ("--kv-heads", "--experts", "--top-k"):
        if not given.get(flag, "0").isdecimal():
            raise UserError(f"{flag}={given[flag]} is not a number")
    if "--top-k" in given and "--experts" not in given:
        raise UserError("--top-k is of --experts, which is not given")
    native = has_adapter(source) or read_hf_config(source) is None
    if dtype is not None and not native:
        raise UserError("--dtype is for Hugging Face folders: a native one holds float32 and remembers dtypes")
    model = load_merged(source)
    if "--kv-heads" in given:
        from llm_jax.models.grouping_heads import group_heads

        model = group_heads(model, int(given["--kv-heads"]))
    if "--experts" in given:
        from llm_jax.models.upcycling import with_experts

        model = with_experts(model, int(given["--experts"]), int(given.get("--top-k", "2")))
    if "--prefix-lm" in given:
        from llm_jax.models.prefix_adaptation import with_prefix_lm

        model = with_prefix_lm(model)
    if native:
        # A model that no folder of its family can hold is refused before DST is made.
        hf_contents(model, dtype)
    with written(target, WRITTEN):
        if native:
            save(model, target, dtype)
        else:
            save_native(model, target)
    made = f", family {model.config.family}" if {"--experts", "--prefix-lm"} & given.keys() else ""
    print(f"wrote {target} ({'Hugging Face' if native else 'native'} layout{made})")
    tensors, size, digest = checksum(model, dtype)
    print(f"{tensors} tensors, {size:,} bytes, sha256 {digest}")
    lossy = rounded(model, dtype) if native else []
    if lossy:
        print(f"{len(lossy)} tensors hold more digits than the dtype that they are written in: they are rounded")
    if "--verify" in given:
        from llm_jax.jobs.verify import verify

        as_written = dtype if native else "float32"
        print(f"verify: {verify(model, load(target), as_written, exact=not lossy)}")


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
