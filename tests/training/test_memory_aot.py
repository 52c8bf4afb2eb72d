"""Bytes per device inside the compiled step, from the program that the real TPU compiler makes for eight chips.

No accelerator is needed: install the extra `aot`, then `pytest -m aot tests/training/test_memory_aot.py`.
With Psi parameters on N devices, c bytes of compute dtype and g of gradients, the peak of the step beyond the
persistent state is, of weights and gradients: cPsi + gPsi in stage 1, cPsi + gPsi/N in stage 2, c * one layer + gPsi/N
in stage 3. A deep model of one token row a device makes activations small; what there is of them is named.
"""

import os
from dataclasses import dataclass

import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytest.importorskip("libtpu")
pytestmark = pytest.mark.aot

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from llm_jax.base.trees import flatten, tree_bytes  # noqa: E402
from llm_jax.models import Decoder, ModelConfig, abstract_params, bind, declarations, token_scores  # noqa: E402
from llm_jax.sharding import MeshConfig, make_plan  # noqa: E402
from llm_jax.training import Objective, OptimizerConfig, abstract_state, make_optimizer, make_train_step  # noqa: E402
from llm_jax.training.memory import step_memory  # noqa: E402

N, MICROBATCHES, ROWS, LENGTH = 8, 4, 8, 128
COMPUTE, GRADIENT = 2, 4
MIB = 2**20
# Deep, so that what one layer takes besides is small; and wide enough that a layer does not fit the chip's 128 MiB of
# VMEM, which HBM figures omit (a gathered layer that does is missing from them).
MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=2560,
    intermediate_size=10240,
    num_layers=32,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    persistent: int
    beyond: int
    psi: int
    layer: int
    hidden: int
    described: int
    """What `describe` says of the step beyond the persistent state."""


def objective(decoder: Decoder) -> Objective:
    def terms(params, frozen, rows, statistics, key):
        model = bind(decoder, params["policy"])
        hidden, _, _ = model(rows["tokens"], rows["positions"], rows["segment_ids"])
        mask = rows["segment_ids"] > 0
        return {"nll": -token_scores(model, hidden, rows["tokens"], mask)["logps"].sum()}, {}

    return Objective(terms, lambda batch: {"nll": (batch["segment_ids"] > 0).sum()})


def compile_step(zero: int) -> Memory:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
    plan = make_plan(MeshConfig(data=N, zero=zero), devices=devices, compute_dtype="bfloat16")
    decoder = Decoder(MODEL, remat="full")
    shapes, declared = abstract_params(decoder), {"policy": declarations(decoder)}
    optimizer = make_optimizer(OptimizerConfig(), declared, 100)
    state = abstract_state({"policy": shapes}, optimizer, declared, plan)
    rows = jax.ShapeDtypeStruct(
        (MICROBATCHES, ROWS, LENGTH), jnp.int32, sharding=plan.activation_sharding((None, "batch", "length"))
    )
    batch = dict.fromkeys(("tokens", "positions", "segment_ids"), rows)
    step = make_train_step(objective(decoder), optimizer, plan, declared)
    memory = step.lower(state, batch).compile().memory_analysis()
    layers = tree_bytes(shapes["segments"]) // 4
    said = step_memory(
        state,
        declared,
        decoder,
        objective,
        plan,
        batch_size=MICROBATCHES * ROWS,
        window=LENGTH,
        microbatches=MICROBATCHES,
    )
    return Memory(
        persistent=memory.argument_size_in_bytes,
        # What is donated is written in place: the outputs are no bytes of their own.
        beyond=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        psi=sum(leaf.size for leaf in flatten(shapes).values()),
        layer=layers // MODEL.num_layers,
        described=said.total - said.persistent,
        hidden=MODEL.num_layers * ROWS // N * LENGTH * MODEL.hidden_size * COMPUTE,
    )


def formula(zero: int, m: Memory) -> float:
    gradients = GRADIENT * m.psi / (1 if zero < 2 else N)
    return gradients + COMPUTE * (m.psi if zero < 3 else m.layer)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_step_takes_what_the_formula_says(zero, capsys):
    m = compile_step(zero)
    want = formula(zero, m) + m.hidden
    with capsys.disabled():
        print(
            f"\nZeRO {zero}, {m.psi / 1e6:.0f}M parameters, {N} x v6e, {MICROBATCHES} microbatches, MiB: "
            f"persistent {m.persistent / MIB:.0f} (12Psi/N {12 * m.psi / N / MIB:.0f}); "
            f"step {m.beyond / MIB:.0f} (formula and block inputs {want / MIB:.0f}), ratio {m.beyond / want:.3f}; "
            f"described {m.described / MIB:.0f}"
        )
    assert abs(m.persistent / (12 * m.psi / N) - 1) < 0.01
    assert abs(m.beyond / want - 1) < 0.05
    assert abs(m.described / m.beyond - 1) < 0.1
