"""Whole training steps, by the real compilers: our kernels are in the program, and nothing took their place; gradients
are reduced to the shards that keep them.

Llama 8B and Mixtral 8x7B with two of their layers: layers are scanned, so that more of them give the same program.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "experiments" / "scale" / "compile_pod.py"
MIXTRAL = {
    "model.family": "mixtral",
    "model.vocab_size": 32000,
    "model.experts.num": 8,
    "model.experts.top_k": 2,
    "train.balancing.load_balance": 0.01,
}
MODELS = {"llama": {}, "mixtral": MIXTRAL}
ATTENTION = {f"llm_jax_flash_attention_{part}" for part in ("forward", "dq", "dkv")}
EXPERTS = {f"llm_jax_grouped_matmul{part}" for part in ("", "_input_gradient", "_weight_gradient")}
EXPERTS |= {"llm_jax_grouped_swiglu_input_gradient"}
LOSS = {
    "tpu": {f"llm_jax_linear_cross_entropy{part}" for part in ("", "_hidden_gradient", "_head_gradient")},
    "gpu": {f"llm_jax_linear_cross_entropy{part}" for part in ("", "_logit_gradient")},
}
OF_MODEL = {"llama": ATTENTION, "mixtral": ATTENTION | EXPERTS}


def step(topology: str, model: str) -> dict[str, Any]:
    """What `compile_pod.py` tells of a step in ZeRO 3."""
    changed = {"model.num_layers": 2, "data.window": 4096} | MODELS[model]
    options = [f"--set={name}={value}" for name, value in changed.items()]
    command = [sys.executable, str(SCRIPT), f"--topology={topology}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("model", MODELS)
def test_tpu(topology, model):
    pytest.importorskip("libtpu")
    told = step(topology, model)
    assert set(told["kernels"]) == OF_MODEL[model] | LOSS["tpu"]
    # At least those of the embedding and the head: gradients are cut as they are summed.
    assert told["collectives"]["reduce-scatter"] >= 2
    assert told["loops_counted_once"] == []


@pytest.mark.aot_gpu
@pytest.mark.parametrize("model", MODELS)
def test_gpu(model):
    pytest.importorskip("jax_cuda13_plugin")
    assert set(step("h200:1x1x8", model)["kernels"]) == OF_MODEL[model] | LOSS["gpu"]
