"""Fewer key and value heads: what they save in decoding, what they cost in loss, and what a little training gets back.

    python experiments/studies/kv_heads.py [--steps 1600] [--seeds 3]

The claims (Shazeer 2019; Ainslie et al. 2023): a cache of K heads is K / N the size and decodes faster, at a small loss
that is largest with one head; and a model with N heads whose heads are pooled (`models/grouping_heads.py`) gets to the
loss of one trained so from the start, or nearly, with 5% of its training. Models of 8 query heads: each trained from
random weights; and the one of 8 key heads pooled, as it is and after 5% more steps at a quarter of the peak rate, which
the model of 8 heads gets too. Decoding is timed with random weights, larger, behind a long prompt; `--seeds` are
repeats there. Prints Markdown tables; the plot has the losses by how many query heads share a key head.
"""

import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import (
    Recipe,
    Trained,
    Trainer,
    cell,
    compared,
    count_parameters,
    evaluate,
    make_parser,
    mean,
    packed_rows,
    say,
    table,
    text,
)
from plot import lines

from llm_jax.inference import decode_step, decoding_decoder, prefill
from llm_jax.models import Decoder, Model, ModelConfig, init_params
from llm_jax.models.cache import init_caches
from llm_jax.models.cache_bytes import cache_bytes
from llm_jax.models.grouping_heads import group_heads

VOCAB, WINDOW, HEADS = 1024, 128, 8


def timed_steps(config: ModelConfig, rows: int, prompt: int, repeats: int, tokens: int) -> Iterator[float]:
    """Milliseconds a decoding step, over `tokens` of them at a time, behind prompts that were read before."""
    decoder = decoding_decoder(config)
    params = init_params(decoder, 0)
    ids = np.random.default_rng(0).integers(4, VOCAB, (rows, prompt), dtype=np.int32)
    caches: Any = init_caches(config, rows, prompt + 1 + repeats * tokens)
    logits, caches = prefill(decoder, params, caches, ids, np.full(rows, prompt, np.int32))
    lengths, last = np.full(rows, prompt, np.int32), np.argmax(logits, axis=-1).astype(np.int32)
    _, caches = jax.block_until_ready(decode_step(decoder, params, caches, last, lengths))  # Compiles.
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(tokens):
            lengths = lengths + 1
            logits, caches = decode_step(decoder, params, caches, last, lengths)
            jax.block_until_ready(logits)
        yield 1e3 * (time.perf_counter() - begin) / tokens


def speed(options: Namespace, counts: tuple[int, ...]) -> str:
    width, prompt, tokens, rows = (64, 64, 8, 2) if options.scale == "test" else (512, 1536, 64, 8)
    configs = {
        kv_heads: ModelConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            num_heads=HEADS,
            num_kv_heads=kv_heads,
            num_layers=4,
            intermediate_size=width,
        )
        for kv_heads in counts
    }
    steps = [timed_steps(config, rows, prompt, options.seeds, tokens) for config in configs.values()]
    # In turns, so that a busy machine disturbs all alike.
    times = zip(*zip(*steps, strict=True), strict=True)
    body = []
    for (kv_heads, config), each in zip(configs.items(), times, strict=True):
        per_token = cache_bytes(config, "float32").per_token
        body.append([kv_heads, per_token, f"{per_token * rows * prompt / 2**20:.0f}", cell(each, 2)])
    return table(["key heads", "cache bytes a token", f"MiB of {rows} × {prompt} tokens", "ms a step"], body)


def main() -> None:
    options = make_parser(__doc__, __file__, steps=1600).parse_args()
    test = options.scale == "test"
    counts = (HEADS, 1) if test else (HEADS, 4, 2, 1)
    print(speed(options, counts) + "\n", flush=True)
    layers = 1 if test else 2
    read = text(VOCAB, 100_000 if test else 3_000_000)
    rows = packed_rows(read.tokenizer, read.train, WINDOW)
    held_out = {name: x[:256] for name, x in packed_rows(read.tokenizer, read.held_out, WINDOW).items()}
    whole = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_heads=HEADS,
        head_dim=16,
        num_layers=layers,
        intermediate_size=128,
        tie_embeddings=True,
        embed_init_std=0.1,
    )
    seeds = range(options.seeds)
    recipe = Recipe(options.steps, looks=1)
    more = Recipe(max(1, options.steps // 20), rate=recipe.rate / 4, looks=1)
    scratch: dict[int, list[Trained]] = {}
    pooled: dict[int, list[float]] = {}
    uptrained: dict[int, list[float]] = {}
    for kv_heads in counts:
        config = Decoder(replace(whole, num_kv_heads=kv_heads)).config
        trainer, further = Trainer(config, recipe), Trainer(config, more)
        scratch[kv_heads] = [trainer(rows, held_out, seed) for seed in seeds]
        pooled[kv_heads], uptrained[kv_heads] = [], []
        for seed, start in enumerate(scratch[HEADS]):
            model = group_heads(Model(Decoder(whole), start.params, whole), kv_heads)
            pooled[kv_heads].append(evaluate(model.decoder, model.params, held_out))
            # Other rows first than those it began with.
            uptrained[kv_heads].append(further(rows, held_out, seed + options.seeds, model.params).loss)
        seconds = mean(one.curve[-1].seconds for one in scratch[kv_heads])
        losses = [[one.loss for one in scratch[kv_heads]], pooled[kv_heads], uptrained[kv_heads]]
        say(f"{kv_heads}: {[cell(each) for each in losses]}, {seconds:.1f} s from the start")
    from_start = {kv_heads: [one.loss for one in found] for kv_heads, found in scratch.items()}
    body = [
        [
            kv_heads,
            count_parameters(replace(whole, num_kv_heads=kv_heads)),
            f"{cell(losses)} {compared(losses, from_start[HEADS]) if kv_heads != HEADS else ''}",
            cell(pooled[kv_heads]),
            f"{cell(uptrained[kv_heads])} {compared(uptrained[kv_heads], losses)}",
            compared(uptrained[kv_heads], uptrained[HEADS]) if kv_heads != HEADS else "",
        ]
        for kv_heads, losses in from_start.items()
    ]
    head = [
        "parameters",
        f"held-out loss, beside {HEADS} heads",
        "pooled",
        "pooled + 5%, beside its own from the start",
        f"beside {HEADS} heads + 5%",
    ]
    print(table(["key heads", *head], body))
    curves = {"from the start": from_start, "pooled": pooled, "pooled + 5%": uptrained}
    points = {name: [(HEADS // kv_heads, mean(each)) for kv_heads, each in by.items()] for name, by in curves.items()}
    Path(options.svg).write_text(lines(points, "query heads a key head; held-out loss, nats per token", log_x=True))


if __name__ == "__main__":
    main()
