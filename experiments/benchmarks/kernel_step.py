"""A training step of a dense Llama of about a billion parameters on one device."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, ModelConfig, declarations, init_params
from llm_jax.models.flops import training_flops_per_token
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import OptimizerConfig, init_state, make_optimizer, make_train_step
from llm_jax.training.peaks import peak_flops

GOAL = "≥ 60% of 989 TFLOP/s"


@dataclass(frozen=True)
class Step:
    """Of one step: the median time, flops of the model with causal attention at half, tokens, peak bytes."""

    parameters: int
    tokens: int
    seconds: float
    flops: float
    bytes: int
    peak: float | None
    """FLOP/s of the device's datasheet."""


def step(size: str, repeats: int, profile: str | None) -> Step:
    """Windows of random tokens. `profile`: a folder for one step's trace, which says where the time goes."""
    full = size == "full"
    rows, length = (8, 4096) if full else (2, 64)
    model = ModelConfig(
        vocab_size=32768 if full else 256,
        hidden_size=2048 if full else 32,
        intermediate_size=5632 if full else 64,
        num_layers=20 if full else 2,
        num_heads=16 if full else 4,
        num_kv_heads=8 if full else 2,
    )
    plan = make_plan(MeshConfig(), compute_dtype="bfloat16" if full else "float32")
    decoder = Decoder(model, remat="dots" if full else "none")
    declared = {"policy": declarations(decoder)}
    optimizer = make_optimizer(OptimizerConfig(), declared, 1000)
    params = init_params(decoder, seed=0)
    state = init_state({"policy": params}, optimizer, declared, plan)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size or 0, (1, rows, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    batch: dict[str, Any] = dict(tokens=tokens, positions=positions, segment_ids=ones, loss_mask=ones.astype(np.uint8))
    batch = jax.device_put(batch, plan.activation_sharding((None, "batch")))
    run = make_train_step(sft_objective(decoder), optimizer, plan, declared).lower(state, batch).compile()
    memory = run.memory_analysis()
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state, metrics = run(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    if profile:
        with jax.profiler.trace(profile):
            state, metrics = run(state, batch)
            jax.block_until_ready(metrics)
    return Step(
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        tokens=rows * length,
        seconds=statistics.median(times[2:]),
        flops=training_flops_per_token(decoder.config, length, False) * rows * length,
        bytes=0 if memory is None else memory.peak_memory_in_bytes,
        peak=peak_flops(jax.devices()[0], "bfloat16"),
    )
