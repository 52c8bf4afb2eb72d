"""Packs a file in a process of its own, in small chunks, for tests that kill it.

    python build_process.py FILE TOKENIZER FOLDER STORE PACKING SECONDS

SECONDS: each shard takes at least so long.
"""

import sys
import time

from llm_jax.base.config import bind
from llm_jax.data import build
from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizers import load_tokenizer

file, tokenizer, folder, store, packing, seconds = sys.argv[1:]
write_shard = build.write_shard


def slowly(*args):
    time.sleep(float(seconds))
    return write_shard(*args)


build.CHUNK_ITEMS = 400
build.write_shard = slowly  # pyright: ignore[reportAttributeAccessIssue]
data = bind(DataConfig, {"path": file, "window": 64, "eval_fraction": 0.1, "packing": packing})
prepare("pretrain", data, load_tokenizer(tokenizer), folder, store)
print("prepared", flush=True)
