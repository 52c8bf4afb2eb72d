"""A training step of a config, compiled by the real TPU or GPU compiler for a cluster that is not there.

    python experiments/scale/compile_pod.py --topology v5p:2x4x4 --rows 4 --microbatches 4
    python experiments/scale/compile_pod.py --topology v6e:8x8 --rows 1 --microbatches 4
    python experiments/scale/compile_pod.py --topology h200:1x1x8 --rows 1 --microbatches 4

TPUs need the extra `aot` (libtpu), GPUs an environment with `jax[cuda13]`; neither needs an accelerator. Prints whether
the step fits, bytes per chip, the collectives, and for TPUs the compiler's own estimate of the step's time (that of
communication, which it does not give, left out) with the share of peak that it implies: model FLOPs (6 per weight of a
matrix product and token, and causal attention at half of its square; no recomputation) over time and the datasheet's
bfloat16 peak. Figures that were seen are in `README.md` beside this file.
"""

import argparse
import json
import math
import os
import re
import time
from pathlib import Path

from hlo_cycles import program_cycles

os.environ.update(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="-1")

import jax

from llm_jax.jobs.registry import load_config
from llm_jax.jobs.terms import sft_objective
from llm_jax.kernels.linear_cross_entropy.xla import CHUNK_TOKENS
from llm_jax.models import Decoder, abstract_params, declarations
from llm_jax.models.flops import training_flops_per_token
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.sharding.described import devices_of
from llm_jax.training import abstract_state, make_optimizer, make_train_step
from llm_jax.training.peaks import peak_flops

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain.py"
GIB = 2**30
CLOCK = 1.75e9
"""Of v5p and v6e: their datasheets' peak over two operations a cycle of every cell of their matrix units."""
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def trips(around: int | None, tokens: int) -> float:
    """How often the loops turn whose end is data.

    Inside of another: attention's blocks of keys, of which a causal query sees half. Alone: the chunks of tokens of the
    loss, none of them masked out here.
    """
    return (around + 1) / 2 if around else math.ceil(tokens / CHUNK_TOKENS["tpu"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--variant", default="llama_8b", help="of configs/pretrain.py")
    parser.add_argument("--rows", type=int, default=1, help="windows per chip and microbatch")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--remat", default=None)
    parser.add_argument("--tensor", type=int, default=1)
    args = parser.parse_args()

    config = load_config(f"{CONFIG}:{args.variant}").resolve([("data.path", "-"), ("tokenizer.path", "-")])
    devices = devices_of(args.topology)
    mesh = MeshConfig(data=len(devices) // args.tensor, tensor=args.tensor, zero=3)
    plan = make_plan(mesh, devices=devices, compute_dtype=config.train.compute_dtype)
    decoder = Decoder(config.model, remat=args.remat or config.train.remat)
    declared = {"policy": declarations(decoder)}
    optimizer = make_optimizer(config.train.optimizer, declared, config.train.steps)
    state = abstract_state({"policy": abstract_params(decoder)}, optimizer, declared, plan)
    rows = args.rows * len(devices) // args.tensor
    where = plan.activation_sharding((None, "batch"))
    shape = (args.microbatches, rows, config.data.window)
    batch = {n: jax.ShapeDtypeStruct(shape, "int32", sharding=where) for n in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, "uint8", sharding=where)

    start = time.perf_counter()
    compiled = make_train_step(sft_objective(decoder), optimizer, plan, declared).lower(state, batch).compile()
    seconds = time.perf_counter() - start
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = compiled.as_text()
    tokens = args.microbatches * rows * config.data.window / len(devices)
    flops = training_flops_per_token(decoder.config, config.data.window, False) * tokens
    peak = peak_flops(devices[0], "bfloat16")
    figures = {
        "topology": args.topology,
        "chips": len(devices),
        "device": devices[0].device_kind,
        "remat": decoder.remat,
        "tokens_per_chip": int(tokens),
        "compile_seconds": round(seconds, 1),
        "state_gib": round(memory.argument_size_in_bytes / GIB, 2),
        "peak_gib": round(memory.peak_memory_in_bytes / GIB, 2),
        "collectives": {op: len(re.findall(rf" {op}(?:-start)?\(", text)) for op in COLLECTIVES},
        "model_tflop_per_chip": round(flops / 1e12, 1),
        "seconds_at_peak": round(flops / peak, 3) if peak else None,
    }
    if "estimated_cycles" in text:
        turned, once = program_cycles(text, lambda name, around: trips(around, args.rows * config.data.window))
        estimate = turned / CLOCK
        figures |= {
            "optimal_seconds_bodies_once": round(costs.get("optimal_seconds", 0), 3) or None,
            "estimated_seconds_bodies_once": round(once / CLOCK, 3),
            "estimated_seconds": round(estimate, 3),
            "tokens_per_s_per_chip": round(tokens / estimate),
            "share_of_peak": round(flops / peak / estimate, 3) if peak else None,
        }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
