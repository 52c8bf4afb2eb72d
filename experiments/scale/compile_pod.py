"""A training step of a config, compiled by the real TPU or GPU compiler for a cluster that is not there.

    python experiments/scale/compile_pod.py --topology v5p:2x4x4 --rows 4 --microbatches 4
    python experiments/scale/compile_pod.py --topology v6e:8x8 --rows 1 --microbatches 4
    python experiments/scale/compile_pod.py --topology h200:1x1x8 --rows 1 --microbatches 4

TPUs need the extra `aot` (libtpu), GPUs the extra `aot-gpu`; neither needs an accelerator. Prints whether the step
fits, bytes per chip, how often each of our kernels and each collective stands in the program, the time of the step at
the datasheet's bfloat16 peak, by model FLOPs (6 per weight of a matrix product and token, and causal attention at half
of its square; no recomputation), and for TPUs the compiler's own estimate of the cycles of what XLA made itself:
of Pallas kernels and of communication it gives none. Figures that were seen are in `README.md` beside this file.
"""

import argparse
import collections
import json
import os
import time
from pathlib import Path

from hlo_program import collectives, cycles

os.environ.update(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="-1")

import jax

from llm_jax.jobs.registry import load_config
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, abstract_params, declarations
from llm_jax.models.flops import training_flops_per_token
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.sharding.described import custom_calls, devices_of
from llm_jax.training import abstract_state, make_optimizer, make_train_step
from llm_jax.training.peaks import peak_flops

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain.py"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--variant", default="llama_8b", help="of configs/pretrain.py")
    parser.add_argument("--rows", type=int, default=1, help="windows per chip and microbatch")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--remat", default=None)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the config; repeatable")
    args = parser.parse_args()

    changed = [tuple(text.split("=", 1)) for text in args.set]
    config = load_config(f"{CONFIG}:{args.variant}").resolve([("data.path", "-"), ("tokenizer.path", "-"), *changed])
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
    memory = compiled.memory_analysis()
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
        "kernels": collections.Counter(name for name, _ in custom_calls(text) if name.startswith("llm_jax_")),
        "collectives": collectives(text),
        "model_tflop_per_chip": round(flops / 1e12, 1),
        "seconds_at_peak": round(flops / peak, 3) if peak else None,
    }
    if "estimated_cycles" in text:
        figures["xla_cycles"], figures["loops_counted_once"] = cycles(text)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
