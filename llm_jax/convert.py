"""`python -m llm_jax.convert SRC DST`: a Hugging Face folder to a native one, and back."""

import sys
from typing import TYPE_CHECKING

from llm_jax.base.door import run_door

if TYPE_CHECKING:
    from llm_jax.models.loading import Model

USAGE = """usage: python -m llm_jax.convert SRC DST [--dtype=float32|bfloat16|float16] [--kv-heads=G] [--verify]

SRC a Hugging Face folder  -> DST a native folder (checkpoints, tokenizer, architecture)
SRC a native folder or a workdir -> DST a Hugging Face folder (config.json, safetensors, tokenizer)

Which one SRC is, is recognised. DST must be empty or absent.
Tensors keep their values and, going back, their dtypes, or get the one of --dtype.
The checksum is over names, dtypes, shapes and values: both layouts of one model have the same.
--kv-heads=G makes a model of G key and value heads, each the mean of those it stands for (then train on).
--verify reads DST again and compares logits and greedy tokens of both, or the scores of models that end in them."""

FLAGS = {"--dtype": "float32", "--kv-heads": "2"}
VERIFIED_TOKENS, GREEDY_TOKENS = 32, 16


def main(args: list[str]) -> None:
    if {"--help", "-h"} & set(args):
        print(USAGE)
        return
    from llm_jax.base.errors import UserError
    from llm_jax.base.flags import read_flags

    words, given, _ = read_flags(args, FLAGS, ("--verify",))
    if len(words) != 2:
        raise UserError(f"convert takes SRC and DST, not {len(words)} arguments (see --help)")

    from llm_jax.storage.remote import to_path

    source, target = map(to_path, words)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty")

    from llm_jax.models.loading import FLOATS, load, read_hf_config
    from llm_jax.models.saving import checksum, rounded, save, save_native

    dtype = given.get("--dtype")
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(FLOATS)}")
    native = read_hf_config(source) is None
    if dtype is not None and not native:
        raise UserError("--dtype is for Hugging Face folders: a native one holds float32 and remembers dtypes")
    model = load(source)
    if "--kv-heads" in given:
        from llm_jax.models.grouping_heads import group_heads

        if not given["--kv-heads"].isdecimal():
            raise UserError(f"--kv-heads={given['--kv-heads']} is not a number")
        model = group_heads(model, int(given["--kv-heads"]))
    if native:
        save(model, target, dtype)
    else:
        save_native(model, target)
    print(f"wrote {target} ({'Hugging Face' if native else 'native'} layout)")
    tensors, size, digest = checksum(model, dtype)
    print(f"{tensors} tensors, {size:,} bytes, sha256 {digest}")
    lossy = rounded(model, dtype) if native else []
    if lossy:
        print(f"{len(lossy)} tensors hold more digits than the dtype that they are written in: they are rounded")
    if "--verify" in given:
        verify(model, load(target), exact=not lossy)


def verify(model: "Model", again: "Model", exact: bool) -> None:
    """Prints how the two compare. Raises RunError where they are not one model, if `exact` to the last bit."""
    import numpy as np

    from llm_jax.base.errors import RunError
    from llm_jax.inference import Generator, SamplingParams

    vocab = model.config.vocab_size or 1
    length = min(VERIFIED_TOKENS, model.config.max_position_embeddings)
    tokens = np.random.RandomState(0).randint(0, vocab, (2, length)).astype(np.int32)
    what = "logits" if model.config.head.labels is None else "scores"
    one, two = (
        np.asarray(each(tokens) if what == "logits" else each.scores(tokens), np.float32) for each in (model, again)
    )
    off = float(np.abs(one - two).max() / max(1.0, float(np.abs(one).max())))
    said, differ = f"verify: {what} differ by {off:.1e} of the largest", off > 0
    if what == "logits" and model.config.causal:
        prompt = tokens[:1, : max(1, length // 2)].tolist()
        count = min(GREEDY_TOKENS, length - len(prompt[0]))
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        greedy = [Generator(each).generate(prompt, params)[0].tokens for each in (model, again)]
        same = sum(a == b for a, b in zip(*greedy))
        said, differ = f"{said}, {same} of {len(greedy[0])} greedy tokens are equal", differ or same < len(greedy[0])
    print(said)
    if exact and differ:
        raise RunError("verify: what was written is not the model that was read")


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
