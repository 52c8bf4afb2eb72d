"""RoPE, ALiBi and sinusoidal positions at 1 to 8 times the trained length, RoPE with and without scaling.

    python experiments/studies/positions.py [--steps 500] [--seeds 3]

The claims: ALiBi goes on beyond the trained length where RoPE and sinusoids fail (Press et al. 2021), and scaled RoPE
repairs much of that without training: linear (Chen et al. 2023), dynamic NTK, YaRN (Peng et al. 2023; its loss without
training on). At every length the same targets are scored, the last half of a trained length of each held-out stretch,
with more and more of their document before them: only what a model makes of that differs. Prints a Markdown table of
losses and, seed by seed, of their change from the trained length; the plot has means over the seeds.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import Recipe, Rows, Trainer, cell, changed, evaluate, make_parser, mean, packed_rows, say, stacked, table
from common import text as read_text
from plot import lines

from llm_jax.data.encode import Sequence as TokenSequence
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.models import Decoder, ModelConfig
from llm_jax.models.config import RopeScaling

VOCAB, TRAINED = 1024, 64
POSITIONS = ("rope", "alibi", "sinusoidal")


def scalings(times: int) -> dict[str, RopeScaling | None]:
    """RoPE for so many times the trained length."""
    return {
        "rope": None,
        "rope, linear": RopeScaling("linear", factor=times),
        "rope, dynamic NTK": RopeScaling("dynamic"),
        "rope, YaRN": RopeScaling("yarn", factor=times, original_length=TRAINED),
    }


def stretches(tokenizer: Tokenizer, documents: list[list[int]], times: tuple[int, ...], most: int) -> dict[int, Rows]:
    """By how many times the trained length: rows that end in the same tokens, of which the last half are targets."""
    longest = TRAINED * max(times)
    ends = [ids[i : i + longest] for ids in documents for i in range(0, len(ids) - longest, longest)][:most]

    def row(ids: list[int], length: int) -> list[TokenSequence]:
        mask = np.zeros(length, np.uint8)
        mask[-TRAINED // 2 :] = 1
        return [TokenSequence(np.array(ids[-length:], np.int32), mask)]

    return {n: stacked(tokenizer, n * TRAINED, [row(ids, n * TRAINED) for ids in ends]) for n in times}


def main() -> None:
    options = make_parser(__doc__, __file__, steps=500).parse_args()
    test = options.scale == "test"
    read = read_text(VOCAB, 1_000_000 if test else 3_000_000)
    rows = packed_rows(read.tokenizer, read.train, TRAINED)
    held_out = {name: x[:256] for name, x in packed_rows(read.tokenizer, read.held_out, TRAINED).items()}
    lengths = (1, 2) if test else (1, 2, 4, 8)
    targets = stretches(read.tokenizer, read.held_out, lengths, most=8 if test else 128)
    say(f"{len(targets[1]['tokens'])} held-out stretches")
    common: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "num_layers": 1 if test else 2}
    embedding = {"vocab_size": VOCAB, "tie_embeddings": True, "embed_init_std": 0.1, "embed_scale": 10.0}
    losses: dict[str, dict[int, list[float]]] = {}
    for kind in POSITIONS:
        config = ModelConfig(
            **common, **embedding, intermediate_size=160, positions=kind, max_position_embeddings=TRAINED
        )
        trainer = Trainer(config, Recipe(options.steps, batch=16, looks=1))
        for seed in range(options.seeds):
            found = trainer(rows, held_out, seed)
            say(f"{kind}, seed {seed}: {found.loss:.4f} in {found.curve[-1].seconds:.1f} s")
            for times, these in targets.items():
                arms = scalings(times) if kind == "rope" else {kind: None}
                for name, scaling in arms.items():
                    decoder = Decoder(replace(config, rope_scaling=scaling))
                    loss = evaluate(decoder, found.params, these, batch=8)
                    losses.setdefault(name, {n: [] for n in lengths})[times].append(loss)
    body = []
    for name, by_times in losses.items():
        changes = {n: [after - before for before, after in zip(by_times[1], by_times[n])] for n in lengths[1:]}
        say(f"{name}: {cell(by_times[1])}, {[cell(change) for change in changes.values()]}")
        body.append([name, cell(by_times[1]), *(f"{cell(changes[n])} {changed(changes[n])}" for n in changes)])
    head = [f"loss at {TRAINED} tokens", *(f"change at {n * TRAINED}" for n in lengths[1:])]
    print(table(["positions", *head], body))
    curves = {name: [(n * TRAINED, mean(each)) for n, each in by_times.items()] for name, by_times in losses.items()}
    Path(options.svg).write_text(lines(curves, "tokens seen; loss of the same targets, nats per token", log_x=True))


if __name__ == "__main__":
    main()
