"""The real-size variants: shapes, parameter count and shardings, without an array being made."""

import math
from pathlib import Path

import jax
import pytest

from llm_jax.base.trees import flatten
from llm_jax.jobs.registry import load_config
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, abstract_params, declarations
from llm_jax.sharding import make_plan
from llm_jax.training import abstract_state, make_optimizer, make_train_step

CONFIGS = Path(__file__).parents[2] / "configs"
NEEDED = [("data.path", "texts"), ("tokenizer.path", "tokenizer")]
LLAMA_3_8B = 8_030_261_248
"""Parameters of meta-llama/Meta-Llama-3-8B, from its safetensors index (total_size / 2)."""


@pytest.fixture(scope="module")
def parts():
    config = load_config(f"{CONFIGS / 'pretrain.py'}:llama_8b").resolve(NEEDED)
    decoder = Decoder(config.model, remat=config.train.remat)
    plan = make_plan(config.mesh, compute_dtype=config.train.compute_dtype)
    declared = {"policy": declarations(decoder)}
    optimizer = make_optimizer(config.train.optimizer, declared, config.train.steps)
    state = abstract_state({"policy": abstract_params(decoder)}, optimizer, declared, plan)
    return config, decoder, plan, declared, optimizer, state


def test_it_has_the_published_number_of_parameters(parts):
    shapes = flatten(parts[5]["params"])
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == LLAMA_3_8B


def test_masters_and_moments_are_cut_over_all_devices(parts):
    _, _, plan, _, _, state = parts
    held = {key: state[key] for key in ("params", "opt_state")}
    leaves = jax.tree.leaves(held)
    per_device = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    assert per_device == pytest.approx(12 * LLAMA_3_8B / plan.mesh.size, rel=1e-6)


def test_a_step_keeps_every_shape(parts):
    config, decoder, plan, declared, optimizer, state = parts
    step = make_train_step(sft_objective(decoder), optimizer, plan, declared)
    rows = (1, plan.mesh.size, config.data.window)
    batch = {name: jax.ShapeDtypeStruct(rows, "int32") for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = jax.ShapeDtypeStruct(rows, "uint8")
    out, metrics = step.lower(state, batch).out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
