"""A training step of an adapter beside that of the whole model: time, and bytes between steps and within one.

    python experiments/benchmarks/lora_step.py [STEPS]

One model, one batch of 8 rows of 256 tokens, float32, AdamW, this CPU. `state` are the bytes that lie there between
steps (parameters, frozen ones too, and the optimizer's), `optimizer` those of its moments, `temporaries` what XLA
allocates for the step besides. Sides take turns; the time is the best of STEPS (default 10).
"""

import sys
import time
from typing import Any

import jax
import numpy as np
from ours import make_decoder

from llm_jax.adapters.config import LoraConfig
from llm_jax.base.trees import flatten, tree_bytes
from llm_jax.jobs.adapting import Adapting
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import declarations, init_params
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import OptimizerConfig, init_state, make_optimizer, make_train_step

ROWS, WINDOW = 8, 256
SIDES: dict[str, LoraConfig | None] = {
    "full": None,
    "LoRA r=8, q and v": LoraConfig(r=8, target_modules=("q_proj", "v_proj")),
    "LoRA r=8, all linear": LoraConfig(r=8),
    "DoRA r=8, all linear": LoraConfig(r=8, use_dora=True),
}


def batch(vocab: int) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(0, vocab, (1, ROWS, WINDOW)).astype(np.int32)
    positions = np.broadcast_to(np.arange(WINDOW, dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    return {"tokens": tokens, "positions": positions, "segment_ids": ones, "loss_mask": ones.astype(np.uint8)}


def side(config: LoraConfig | None) -> tuple[Any, Any, Any]:
    """The step, its state, and what it was compiled to."""
    decoder, plan = make_decoder("6.8M"), make_plan(MeshConfig(data=1))
    base, rules = init_params(decoder, 0), OptimizerConfig(schedule="constant")
    if config is None:
        declared: dict[str, Any] = {"policy": declarations(decoder)}
        optimizer = make_optimizer(rules, declared, 100)
        state = init_state({"policy": base}, optimizer, declared, plan)
        objective = sft_objective(decoder)
    else:
        adapting = Adapting.of(decoder, config)
        declared = adapting.declarations
        optimizer = make_optimizer(rules, {"policy": declared["policy"]}, 100)
        trained = {"policy": adapting.init(base, 0)}
        state = init_state(trained, optimizer, declared, plan, frozen=adapting.frozen(base, plan))
        objective = adapting.objective(sft_objective(adapting.decoder), training=True)
    step = make_train_step(objective, optimizer, plan, declared)
    return step, state, step.lower(state, batch(decoder.config.vocab_size)).compile().memory_analysis()


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    made = {name: side(config) for name, config in SIDES.items()}
    states = {name: state for name, (_, state, _) in made.items()}
    best = dict.fromkeys(made, float("inf"))
    rows = batch(4096)
    for _ in range(repeats + 1):  # The first compiles.
        for name, (step, _, _) in made.items():
            start = time.perf_counter()
            states[name], metrics = step(states[name], rows)
            jax.block_until_ready(metrics)
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"{'':<22}{'trained':>12}{'ms a step':>11}{'state MB':>10}{'optimizer MB':>14}{'temporaries MB':>16}")
    for name, (_, _, memory) in made.items():
        state = states[name]
        trained = sum(leaf.size for leaf in flatten(state["params"]).values())
        kept = sum(tree_bytes(state[key]) for key in ("params", "frozen", "opt_state"))
        sizes = (kept, tree_bytes(state["opt_state"]), memory.temp_size_in_bytes)
        print(f"{name:<22}{trained:>12,}{best[name] * 1e3:>11.0f}" + "".join(
            f"{size / 1e6:>{width}.1f}" for size, width in zip(sizes, (10, 14, 16))
        ))  # fmt: skip


if __name__ == "__main__":
    main()
