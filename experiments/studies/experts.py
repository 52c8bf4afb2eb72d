"""A mixture of experts: its loss beside dense models, its balance, its dropped tokens, its speed, its overfitting.

    python experiments/studies/experts.py [--parts balance capacity dense decode sft] [--steps 300] [--seeds 3]

Prints a Markdown table for each part; the plot has the held-out losses of `dense` over the time of training. Claims:

balance   Without a balancing loss the router collapses onto few experts (Shazeer et al. 2017, section 4); each loss,
          and DeepSeek-V3's moved biases, keep all of them busy. Load 1 is an equal share.
capacity  Dropping what is over capacity costs little at 1.25 (Switch, table 1); dropless costs nothing.
dense     At equal active flops a mixture reaches the dense model's loss "4 times faster".
decode    A mixture decodes faster than a dense model of as many parameters.
sft       A mixture overfits more in fine-tuning, the more the less data there is (Switch, section 2.4; ST-MoE, 4.3).
"""

import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Look,
    Recipe,
    Rows,
    Text,
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
    stacked,
    table,
    text,
)
from plot import lines

from llm_jax.data.embedded import docstrings
from llm_jax.data.encode import Sequence as TokenSequence
from llm_jax.inference import Generator, SamplingParams
from llm_jax.models import Decoder, Model, ModelConfig, init_params
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.training.config import BalancingConfig

WIDTH, DENSE, EXPERTS, TOP_K, WINDOW, VOCAB = 96, 256, 8, 2, 128, 1024
BALANCED = BalancingConfig(load_balance=0.01)
SIGMOID = {"scores": "sigmoid", "correction_bias": True}
BALANCE: dict[str, tuple[dict[str, Any], BalancingConfig]] = {
    "softmax": ({}, BalancingConfig()),
    "load_balance 0.01": ({}, BALANCED),
    "sequence_balance 0.01": ({}, BalancingConfig(sequence_balance=0.01)),
    "router_z 0.001": ({}, BalancingConfig(router_z=1e-3)),
    "noisy": ({"noisy": True}, BalancingConfig()),
    "noisy, importance 0.1": ({"noisy": True}, BalancingConfig(importance=0.1)),
    "noisy, load 0.1": ({"noisy": True}, BalancingConfig(load=0.1)),
    "noisy, both 0.1": ({"noisy": True}, BalancingConfig(importance=0.1, load=0.1)),
    "sigmoid": (SIGMOID, BalancingConfig()),
    "sigmoid, bias_rate 0.003": (SIGMOID, BalancingConfig(bias_rate=3e-3)),
}
"""Each beside the first before it that has no loss and the same router."""


def shape(options: Namespace, **fields: Any) -> ModelConfig:
    small = {"hidden_size": 32, "num_heads": 2} if options.scale == "test" else {"hidden_size": WIDTH, "num_heads": 4}
    config = {"vocab_size": VOCAB, "num_layers": 2, "tie_embeddings": True, "embed_init_std": 0.1, **small, **fields}
    return ModelConfig(**config)


def mixture(options: Namespace, **fields: Any) -> ModelConfig:
    """As many active weights as the dense model."""
    experts = ExpertsConfig(num=EXPERTS, top_k=TOP_K, **fields)
    return shape(options, intermediate_size=DENSE // TOP_K, experts=experts)


def runs(
    options: Namespace, name: str, config: ModelConfig, balancing: BalancingConfig, data: Any, looks: int = 1
) -> list[Trained]:
    trainer, found = Trainer(config, Recipe(options.steps, balancing=balancing, looks=looks)), []
    for seed in range(options.seeds):
        found.append(trainer(*data, seed))
        metrics = {k.split("/")[1]: round(v, 3) for k, v in found[-1].metrics.items() if k.count("/") == 1}
        say(f"{name}, seed {seed}: {found[-1].loss:.4f} in {found[-1].curve[-1].seconds:.1f} s {metrics}")
    return found


def idle(trained: Trained) -> float:
    """Experts with less than a tenth of an equal share, on average over layers."""
    return sum(v < 0.1 for name, v in trained.metrics.items() if name.startswith("experts/load/"))


def balance(options: Namespace, data: Any) -> str:
    body, control = [], []
    for name, (fields, balancing) in BALANCE.items():
        found = runs(options, name, mixture(options, **fields), balancing, data)
        fullest = [one.metrics["experts/load_max"] for one in found]
        losses = [one.loss for one in found]
        if balancing == BalancingConfig():
            control = losses
            beside = ""
        else:
            beside = compared(losses, control)
        emptiest = [one.metrics["experts/load_min"] for one in found]
        entropy = [one.metrics["experts/entropy"] for one in found]
        row = [cell(fullest, 2), cell(emptiest, 2), f"{mean(map(idle, found)):.1f}", cell(entropy, 2), cell(losses)]
        body.append([name, *row, beside])
    head = ["router and loss", "fullest", "emptiest", "idle", "entropy", "held-out loss", "beside no balancing loss"]
    return table(head, body)


def capacity(options: Namespace, data: Any) -> str:
    body, dropless = [], []
    for name, factor in (("dropless", None), ("2.0", 2.0), ("1.25", 1.25), ("1.0", 1.0), ("0.5", 0.5)):
        found = runs(options, f"capacity {name}", mixture(options, capacity_factor=factor), BALANCED, data)
        losses = [one.loss for one in found]
        dropless = dropless or losses
        dropped = [100 * one.metrics["experts/dropped"] for one in found]
        seconds = cell([1e3 * one.curve[-1].seconds / options.steps for one in found], 0)
        body.append([name, cell(dropped, 2), cell(losses), compared(losses, dropless) if factor else "", seconds])
    return table(["capacity factor", "dropped, %", "held-out loss", "beside dropless", "ms a step"], body)


def reached(curve: list[Look], loss: float) -> Look | None:
    """Where a curve first comes down to a loss, on a straight line between two looks; None where it does not."""
    for before, after in zip(curve, curve[1:]):
        if after.loss <= loss < before.loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return Look(*(a + share * (b - a) for a, b in zip(before, after)))  # type: ignore[arg-type]
    return None


def dense(options: Namespace, data: Any) -> str:
    arms = {
        "dense": (shape(options, intermediate_size=DENSE), BalancingConfig()),
        "8 experts, top-2": (mixture(options), BALANCED),
        "dense, as many parameters": (shape(options, intermediate_size=DENSE // TOP_K * EXPERTS), BalancingConfig()),
    }
    found = {name: runs(options, name, *arm, data, looks=8) for name, arm in arms.items()}
    target, body, curves = found["dense"], [], {}
    for name, each in found.items():
        losses = [one.loss for one in each]
        speedups = []
        for measure in ("step", "seconds"):
            places = [reached(one.curve, goal.loss) for one, goal in zip(each, target)]
            ends = [getattr(goal.curve[-1], measure) for goal in target]
            ratios = [end / getattr(place, measure) for end, place in zip(ends, places) if place is not None]
            speedups.append(
                cell(ratios, 2) if len(ratios) == len(target) else f"{len(ratios)} of {len(target)} reach it"
            )
        beside = compared(losses, [one.loss for one in target]) if each is not target else ""
        seconds = cell([1e3 * one.curve[-1].seconds / options.steps for one in each], 0)
        body.append([name, count_parameters(arms[name][0]), cell(losses), beside, seconds, *speedups])
        together = [*zip(*(one.curve for one in each))]
        curves[name] = [(mean(look.seconds for look in looks), mean(look.loss for look in looks)) for looks in together]
    Path(options.svg).write_text(lines(curves, "seconds of training; held-out loss, nats per token"))
    columns = ["parameters", "held-out loss", "beside dense", "ms a step", "steps to dense's loss, times fewer", "time"]
    return table(["model", *columns], body)


def decode(options: Namespace, data: Any) -> str:
    """Of random weights, large enough that reading them is what takes the time."""
    del data
    width, inner, tokens = (32, 32, 8) if options.scale == "test" else (512, 1024, 64)
    common = {"vocab_size": VOCAB, "hidden_size": width, "num_heads": 2, "num_layers": 4}
    arms = {
        "8 experts, top-2": ModelConfig(
            **common, intermediate_size=inner, experts=ExpertsConfig(num=EXPERTS, top_k=TOP_K)
        ),
        "dense, as many parameters": ModelConfig(**common, intermediate_size=inner * EXPERTS),
        "dense, as many active": ModelConfig(**common, intermediate_size=inner * TOP_K),
    }
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    body = []
    for batch in (1, 8):
        calls: dict[str, Callable[[], Any]] = {}
        times: dict[str, list[float]] = {name: [] for name in arms}
        prompts = np.random.default_rng(0).integers(4, VOCAB, (batch, 16)).tolist()
        for name, config in arms.items():
            decoder = Decoder(config)
            generator = Generator(Model(decoder, init_params(decoder, 0), decoder.config), max_batch=batch)
            calls[name] = partial(generator.generate, prompts, sampling)
            calls[name]()
        # In turns, so that a busy machine disturbs all alike.
        for _ in range(options.seeds):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - begin) / tokens)
        for name, each in times.items():
            say(f"decode, {batch} rows, {name}: {cell(each, 2)} ms a token")
            body.append([batch, name, f"{count_parameters(arms[name]) / 1e6:.1f}M", cell(each, 2)])
    return table(["rows", "model", "parameters", "ms a token"], body)


def demonstrations(read: Text, entries: Iterable[docstrings.Entry]) -> Rows:
    """A row each, the docstring as the target; what is longer than the window is left out."""
    found = []
    for entry in entries:
        prompt = read.tokenizer.encode(entry.signature + "\n")
        answer = [*read.tokenizer.encode(entry.docstring), read.tokenizer.eos_id]
        mask = np.array([0] * len(prompt) + [1] * len(answer), np.uint8)
        if len(mask) <= WINDOW:
            found.append([TokenSequence(np.array(prompt + answer, np.int32), mask)])
    return stacked(read.tokenizer, WINDOW, found)


def sft(options: Namespace, data: Any) -> str:
    """Each model of `dense` from its own pretrained weights, the same number of steps on either amount of data.

    The sources that it was pretrained on hold the docstrings of one side only, so a gap is there before: what counts is
    how far it grows.
    """
    read = text(VOCAB, characters(options))
    every, others = (
        random.Random(0).sample(docstrings.entries(side), n) for side, n in (("train", 2000), ("eval", 200))
    )
    held_out = demonstrations(read, others)
    arms = {
        "dense": (shape(options, intermediate_size=DENSE), BalancingConfig()),
        "8 experts, top-2": (mixture(options), BALANCED),
    }
    body, grown = [], {}
    for name, (config, balancing) in arms.items():
        pretrained = runs(options, f"{name}, pretraining", config, balancing, data)
        tuned = Trainer(config, Recipe(max(1, options.steps // 2), rate=1e-3, balancing=balancing, looks=1))
        for share in (1, 100):
            rows = demonstrations(read, every[: len(every) * share // 100])
            sides = {column: x[:200] for column, x in rows.items()}, held_out
            before, after = [], []
            for seed, start in enumerate(pretrained):
                one = tuned(rows, held_out, seed, start.params)
                for losses, params in ((before, start.params), (after, one.params)):
                    losses.append([evaluate(tuned.decoder, params, side) for side in sides])
            growth = [(held - seen) - (h - s) for (seen, held), (s, h) in zip(after, before)]
            columns = [cell(each) for losses in (before, after) for each in zip(*losses)]
            say(f"sft, {name}, {share}%: {columns} gap grows by {cell(growth)}")
            beside = "" if name == "dense" else compared(growth, grown[share])
            grown.setdefault(share, growth)
            seen, held, seen_after, held_after = columns
            body.append(
                [len(rows["tokens"]), name, f"{seen} → {seen_after}", f"{held} → {held_after}", cell(growth), beside]
            )
    head = ["demonstrations", "model", "their loss", "held-out loss", "gap grows by", "beside dense"]
    return table(head, sorted(body, key=lambda row: row[0]))


PARTS = {"balance": balance, "capacity": capacity, "dense": dense, "decode": decode, "sft": sft}


def characters(options: Namespace) -> int:
    return 100_000 if options.scale == "test" else 3_000_000


def main() -> None:
    parser = make_parser(__doc__, __file__, steps=300)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    read = text(VOCAB, characters(options))
    held_out = {name: x[:256] for name, x in packed_rows(read.tokenizer, read.held_out, WINDOW).items()}
    data = packed_rows(read.tokenizer, read.train, WINDOW), held_out
    say(f"{len(data[0]['tokens'])} rows of {WINDOW} to train on, {len(held_out['tokens'])} held out")
    for part in options.parts:
        print(f"\n{part}:\n\n{PARTS[part](options, data)}", flush=True)


if __name__ == "__main__":
    main()
