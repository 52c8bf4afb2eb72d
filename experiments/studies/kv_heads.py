"""Fewer key and value heads: what they save in decoding, what they cost in loss, and what a little training gets back.

    python experiments/studies/kv_heads.py [--steps 400] [--seeds 3]

The claims (Shazeer 2019; Ainslie et al. 2023): a cache of K heads is K / N the size and decodes faster, at a small loss
that is largest with one head; and a model with N heads whose heads are pooled (`models/grouping_heads.py`) gets to the
loss of one trained so from the start, or nearly, with 5% of its training. Models of 8 query heads: each trained from
random weights; and the one of 8 key heads pooled, as it is and after 5% more steps at a quarter of the peak rate, which
the model of 8 heads gets too. Decoding is timed with random weights, larger, over a long text; `--seeds` are repeats
there. Prints Markdown tables; the plot has the losses by number of heads.
"""

import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

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

from llm_jax.inference import Generator, SamplingParams
from llm_jax.models import Decoder, Model, ModelConfig, init_params
from llm_jax.models.cache_bytes import cache_bytes
from llm_jax.models.grouping_heads import group_heads

VOCAB, WINDOW, HEADS = 1024, 128, 8


def speed(options: Namespace, counts: tuple[int, ...]) -> str:
    """Milliseconds a token behind a long prompt, the prompt's own time taken off by a call for one token."""
    width, prompt, tokens, rows = (64, 64, 8, 2) if options.scale == "test" else (512, 1536, 64, 8)
    prompts = np.random.default_rng(0).integers(4, VOCAB, (rows, prompt)).tolist()
    few, many = (SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (1, tokens + 1))
    calls, times, bytes_per_token = {}, {}, {}
    for kv_heads in counts:
        config = ModelConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            num_heads=HEADS,
            num_kv_heads=kv_heads,
            num_layers=4,
            intermediate_size=width,
        )
        decoder = Decoder(config)
        generator = Generator(Model(decoder, init_params(decoder, 0), decoder.config), max_batch=rows)
        calls[kv_heads] = [partial(generator.generate, prompts, sampling) for sampling in (few, many)]
        times[kv_heads], bytes_per_token[kv_heads] = [], cache_bytes(config, "float32").per_token
        for call in calls[kv_heads]:
            call()
    # In turns, so that a busy machine disturbs all alike.
    for _ in range(options.seeds):
        for kv_heads, pair in calls.items():
            seconds = []
            for call in pair:
                begin = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - begin)
            times[kv_heads].append(1e3 * (seconds[1] - seconds[0]) / tokens)
    body = [
        [kv_heads, bytes_per_token[kv_heads], f"{bytes_per_token[kv_heads] * rows * prompt / 2**20:.0f}", cell(each, 2)]
        for kv_heads, each in times.items()
    ]
    return table(["key heads", "cache bytes a token", f"MiB of {rows} × {prompt} tokens", "ms a token"], body)


def main() -> None:
    options = make_parser(__doc__, __file__, steps=400).parse_args()
    test = options.scale == "test"
    counts = (HEADS, 1) if test else (HEADS, 4, 2, 1)
    print(speed(options, counts) + "\n", flush=True)
    width, layers = (64, 1) if test else (128, 3)
    read = text(VOCAB, 100_000 if test else 3_000_000)
    rows = packed_rows(read.tokenizer, read.train, WINDOW)
    held_out = {name: x[:256] for name, x in packed_rows(read.tokenizer, read.held_out, WINDOW).items()}
    whole = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_heads=HEADS,
        num_layers=layers,
        intermediate_size=2 * width,
        tie_embeddings=True,
        embed_init_std=0.1,
    )
    seeds = range(options.seeds)
    recipe = Recipe(options.steps)
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
        say(f"{kv_heads}: {cell([one.loss for one in scratch[kv_heads]])} {cell(uptrained[kv_heads])}")
    from_start = {kv_heads: [one.loss for one in found] for kv_heads, found in scratch.items()}
    body = [
        [
            kv_heads,
            count_parameters(replace(whole, num_kv_heads=kv_heads)),
            f"{cell(losses)} {compared(losses, from_start[HEADS]) if kv_heads != HEADS else ''}",
            cell(pooled[kv_heads]),
            f"{cell(uptrained[kv_heads])} {compared(uptrained[kv_heads], losses)}",
        ]
        for kv_heads, losses in from_start.items()
    ]
    head = [
        "parameters",
        f"held-out loss, beside {HEADS} heads",
        "pooled",
        "pooled + 5%, beside its own from the start",
    ]
    print(table(["key heads", *head], body))
    curves = {"from the start": from_start, "pooled": pooled, "pooled + 5%": uptrained}
    points = {name: [(kv_heads, mean(each)) for kv_heads, each in by.items()] for name, by in curves.items()}
    Path(options.svg).write_text(lines(points, "key heads; held-out loss, nats per token", log_x=True))


if __name__ == "__main__":
    main()
