"""The modern block beside that of 2017, and what each of its parts brings.

    python experiments/studies/blocks.py [--steps 500] [--seeds 3]

The claim: pre-norm RMSNorm, RoPE and SwiGLU (Llama) learn faster than post-norm LayerNorm, sinusoidal positions and
ReLU (Vaswani et al. 2017) at equal parameters (within 1%) and tokens. The ablations change one part of the modern
block. Each arm has the best of RATES for it by its first seed, since post-norm wants smaller steps. Prints a Markdown
table; the plot has the held-out losses by step, means over the seeds.
"""

from pathlib import Path
from typing import Any

from common import Recipe, Trainer, cell, compared, count_parameters, make_parser, mean, packed_rows, say, table, text
from plot import lines

from llm_jax.models import ModelConfig

RATES = (1e-3, 3e-3, 1e-2)
VOCAB, WINDOW = 1024, 128


def arms(width: int) -> dict[str, dict[str, Any]]:
    """Fields that differ from the modern block's. Two matrices of 4 D weigh what three of 8/3 D do."""
    inner = 8 * width // 3
    modern: dict[str, Any] = {"intermediate_size": inner}
    two = {"intermediate_size": inner * 3 // 2, "gated": False}
    return {
        "modern": modern,
        "RMSNorm → LayerNorm": {**modern, "norm": "layer"},
        "SwiGLU → GELU": {**two, "activation": "gelu"},
        "pre → post": {**modern, "norm_at": "post"},
        "RoPE → sinusoidal": {**modern, "positions": "sinusoidal"},
        "2017": {**two, "positions": "sinusoidal", "activation": "relu", "norm": "layer", "norm_at": "post"},
    }


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=500)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    options = parser.parse_args()
    test = options.scale == "test"
    width, layers = (48, 1) if test else (64, 2)
    read = text(VOCAB, 100_000 if test else 3_000_000)
    rows = packed_rows(read.tokenizer, read.train, WINDOW)
    held_out = {name: x[:256] for name, x in packed_rows(read.tokenizer, read.held_out, WINDOW).items()}
    # Token vectors of root mean square 1, as in 2017: sinusoids have 0.7.
    embedding = {"tie_embeddings": True, "embed_init_std": 0.1, "embed_scale": 10.0}
    common = {"vocab_size": VOCAB, "hidden_size": width, "num_heads": 4, "num_layers": layers, **embedding}
    first_arm: list[float] = []
    body, curves = [], {}
    for name, fields in arms(width).items():
        config = ModelConfig(**common, **fields)
        trainers = {rate: Trainer(config, Recipe(options.steps, rate=rate)) for rate in options.rates}
        first = {rate: trainer(rows, held_out, 0) for rate, trainer in trainers.items()}
        for rate, one in first.items():
            say(f"{name}, rate {rate:g}, seed 0: {one.loss:.4f} in {one.curve[-1].seconds:.1f} s")
        rate = min(first, key=lambda rate: first[rate].loss)
        found = [first[rate], *(trainers[rate](rows, held_out, seed) for seed in range(1, options.seeds))]
        losses = [one.loss for one in found]
        beside = compared(losses, first_arm) if first_arm else ""
        first_arm = first_arm or losses
        say(f"{name}: {cell(losses)} {beside}")
        body.append([name, count_parameters(config), f"{rate:g}", cell(losses), beside])
        together = zip(*(one.curve for one in found))
        curves[name] = [(looks[0].step, mean(look.loss for look in looks)) for looks in together]
    Path(options.svg).write_text(lines(curves, "step; held-out loss, nats per token"))
    print(table(["block", "parameters", "learning rate", "held-out loss", "beside the first"], body))


if __name__ == "__main__":
    main()
