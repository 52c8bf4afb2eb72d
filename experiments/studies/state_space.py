"""Mamba and Mamba-2 beside attention: time and memory by length, and what decoding keeps.

    python experiments/studies/state_space.py [--seeds 3] [--longest 16384]

The claims: time and memory of a state-space layer grow in proportion to the length, where attention's time grows with
its square, so that from some length on they are faster; and their decoding state is the same at any length (Gu & Dao
2023; Dao & Gu 2024). Three models of two layers and about as many parameters do forward and backward passes over one
row of real text. Memory is what the compiled program needs for temporaries. `--seeds` are repeats, in turns, so that a
busy machine disturbs all alike. Prints Markdown tables; the plot has the least time by length.
"""

import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import cell, count_parameters, make_parser, say, table, text
from plot import lines

from llm_jax.jobs.scoring import score_rows
from llm_jax.models import Decoder, ModelConfig, bind, init_caches, init_params
from llm_jax.models.mamba_config import MambaConfig

VOCAB, SHORTEST = 1024, 512


def models(width: int) -> dict[str, ModelConfig]:
    common: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": width, "tie_embeddings": True}
    alone = {**common, "positions": "none", "num_heads": 1, "num_layers": 4, "feed_forwards": ("none",) * 4}
    inner = 2 * width
    return {
        "attention": ModelConfig(**common, num_heads=width // 32, num_layers=2, intermediate_size=8 * width // 3),
        "Mamba": ModelConfig(
            **alone, mixers=("mamba",) * 4, mamba=MambaConfig(inner_size=inner, state_size=16, dt_rank=width // 16)
        ),
        "Mamba-2": ModelConfig(
            **alone, mixers=("mamba2",) * 4, mamba=MambaConfig(inner_size=inner, state_size=64, num_heads=inner // 32)
        ),
    }


def compiled(config: ModelConfig, rows: dict[str, Any]) -> tuple[Any, int]:
    """A call of forward and backward, and the bytes of its temporaries."""
    decoder = Decoder(config)
    params = init_params(decoder, 0)

    def loss(params: Any, rows: Any) -> Any:
        scores, mask = score_rows(bind(decoder, params), rows, ("logps",))
        return -scores["logps"].sum() / mask.sum()

    program = jax.jit(jax.grad(loss)).lower(params, rows).compile()
    return lambda: jax.block_until_ready(program(params, rows)), program.memory_analysis().temp_size_in_bytes


def state_bytes(config: ModelConfig, length: int) -> int:
    caches = jax.eval_shape(lambda: init_caches(config, 1, length))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def exponent(at: dict[int, float]) -> float:
    """Of the length, between the two longest."""
    (a, x), (b, y) = sorted(at.items())[-2:]
    return math.log(y / x) / math.log(b / a)


def crossing(own: dict[int, float], other: dict[int, float]) -> str:
    """The length from which on `own` is below `other`, on straight lines in logarithms."""
    lengths = sorted(own)
    gaps = {length: math.log(own[length] / other[length]) for length in lengths}
    if gaps[lengths[-1]] >= 0:
        return f"beyond {lengths[-1]}"
    above = [length for length in lengths if gaps[length] >= 0]
    if not above:
        return f"below {lengths[0]}"
    low = above[-1]
    high = lengths[lengths.index(low) + 1]
    return f"{low * (high / low) ** (gaps[low] / (gaps[low] - gaps[high])):.0f}"


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=None)
    parser.add_argument("--longest", type=int, default=16384)
    options = parser.parse_args()
    test = options.scale == "test"
    read = text(VOCAB, 100_000 if test else 1_000_000)
    line = np.concatenate(read.train)
    lengths = [SHORTEST << i for i in range(int(math.log2(options.longest // SHORTEST)) + 1)]
    configs = models(64 if test else 128)
    least: dict[str, dict[int, float]] = {name: {} for name in configs}
    memory: dict[str, dict[int, float]] = {name: {} for name in configs}
    times, states = [], []
    for length in lengths:
        rows = {
            "tokens": jnp.asarray(line[None, :length], jnp.int32),
            "segment_ids": jnp.ones((1, length), jnp.int32),
            "positions": jnp.arange(length, dtype=jnp.int32)[None],
            "loss_mask": jnp.ones((1, length), jnp.uint8),
        }
        calls, measured = {}, {name: [] for name in configs}
        for name, config in configs.items():
            calls[name], memory[name][length] = compiled(config, rows)
            calls[name]()
        for _ in range(options.seeds):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                measured[name].append(1e3 * (time.perf_counter() - begin))
        for name, each in measured.items():
            least[name][length] = min(each)
            say(f"{length}, {name}: {cell(each, 0)} ms, {memory[name][length] / 2**20:.0f} MiB")
        megabytes = [f"{memory[name][length] / 2**20:.0f}" for name in configs]
        times.append([length, *(cell(measured[name], 0) for name in configs), *megabytes])
        states.append([length, *(state_bytes(config, length) for config in configs.values())])
    head = ["tokens", *(f"{name}, ms" for name in configs), *(f"{name}, MiB" for name in configs)]
    print(table(head, times) + "\n")
    summary = [
        [
            name,
            count_parameters(config),
            f"{exponent(least[name]):.2f}",
            f"{exponent(memory[name]):.2f}",
            "" if name == "attention" else crossing(least[name], least["attention"]),
        ]
        for name, config in configs.items()
    ]
    print(table(["model", "parameters", "time ~ T^", "memory ~ T^", "faster than attention from"], summary) + "\n")
    print(table(["tokens", *(f"{name}, bytes kept in decoding" for name in configs)], states))
    curves = {name: [*sorted(at.items())] for name, at in least.items()}
    Path(options.svg).write_text(lines(curves, "tokens; ms of forward and backward", log_x=True, log_y=True))


if __name__ == "__main__":
    main()
