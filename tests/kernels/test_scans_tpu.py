"""selective_scan and ssd on TPUs, by the interpreter: uninitialised memory is NaN, races raise."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import kernels
from llm_jax.kernels.selective_scan import tpu as selective_scan_tpu
from llm_jax.kernels.ssd import tpu as ssd_tpu
from tests.kernels import devices
from tests.kernels.recurrences import make_scan
from tests.kernels.scan_cases import Case, arguments, check_documents, check_numbers, program

TILES = {"ssd": ssd_tpu.Tiles(chunk=8, lanes=128), "selective_scan": selective_scan_tpu.Tiles(chunk=16, lanes=128)}
CASES = [
    Case("ssd", "float32", True, True, {"heads": (4, 8), "groups": 1}),
    Case("ssd", "float32", False, False, {"heads": (3, 20), "groups": 3}),
    Case("ssd", "bfloat16", True, False, {"heads": (2, 70), "groups": 1, "states": 130}),
    Case("ssd", "bfloat16", False, True, {"heads": (4, 8), "groups": 2}),
    Case("selective_scan", "float32", True, True, {"channels": 5}),
    Case("selective_scan", "bfloat16", False, False, {"channels": 200, "states": 9}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case):
    run = program(case, "tpu", TILES[case.op])
    got = run(*arguments(case))
    check_numbers(case, got)
    if case.packed:
        check_documents(case, run, got)


def _structs(op, dtype, length=256, **sizes):
    return jax.eval_shape(lambda: make_scan(op, jnp.dtype(dtype), batch=1, length=length, **sizes))[:6]


@pytest.mark.parametrize("op", TILES)
def test_what_a_tpu_runs(op):
    with devices.target(devices.TPU):
        assert kernels.explain(op, *_structs(op, "bfloat16")).implementation == "tpu"
        for structs, words in [
            (_structs(op, "float16"), "float16"),
            (_structs(op, "bfloat16", length=1), "a single token"),
            (_structs(op, "bfloat16", states=65536), "MiB"),
        ]:
            choice = kernels.explain(op, *structs)
            assert choice.implementation == "xla" and words in choice.reasons["tpu"]
    assert "not for cpu" in kernels.explain(op, *_structs(op, "bfloat16")).reasons["tpu"]
