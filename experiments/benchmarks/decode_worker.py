"""The workers of `decode.py`: one makes the model, two decode greedily, by llm_jax and by `transformers.generate`."""

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from sides import THREADS, serve

PROMPT, NEW, VOCAB = 128, 128, 4096
Tokens = list[list[int]]


def prompts(batch: int) -> Tokens:
    """The same on both sides, without a library: a linear congruential sequence."""
    state, rows = batch, []
    for _ in range(batch):
        row = []
        for _ in range(PROMPT):
            state = (state * 1103515245 + 12345) % 2**31
            row.append(state // 8 % VOCAB)
        rows.append(row)
    return rows


def save_model(folder: str, kind: str = "llama") -> None:
    """Weights large enough that the likeliest token stands clear of the next."""
    from kinds import config_of
    from ours import make_decoder

    from llm_jax.models import Decoder, Model, init_params, save

    if kind == "llama":
        decoder = make_decoder("6.8M", max_position_embeddings=2 * (PROMPT + NEW), init_std=0.08)
    else:
        decoder = Decoder(config_of(kind))
    save(Model(decoder, init_params(decoder, 0), decoder.config), folder)


def llm_jax(folder: str, batch: int) -> Callable[[], Tokens]:
    from llm_jax import SamplingParams, load
    from llm_jax.base.runtime import keep_memory
    from llm_jax.inference import Generator

    keep_memory()  # As every command of llm_jax does.
    generator = Generator(load(folder), max_batch=batch)
    sampling = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    ids = prompts(batch)
    return lambda: [done.tokens for done in generator.generate(ids, sampling)]


def transformers(folder: str, batch: int) -> Callable[[], Tokens]:
    torch: Any = importlib.import_module("torch")
    hf: Any = importlib.import_module("transformers")
    torch.set_num_threads(THREADS)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = prompts(batch)

    @torch.inference_mode()
    def step() -> Tokens:
        x = torch.tensor(ids)
        out = model.generate(
            x,
            attention_mask=torch.ones_like(x),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        return out[:, PROMPT:].tolist()

    return step


SIDES = {"llm_jax": llm_jax, "transformers": transformers}

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    side = options.pop("side")
    if side == "save":
        save_model(**options)
    else:
        serve(side, SIDES[side](**options), warmups=1)
