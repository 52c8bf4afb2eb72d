"""selective_scan and ssd on TPUs, by the interpreter: uninitialised memory is NaN, races raise."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import kernels
from llm_jax.kernels.selective_scan import tpu as selective_scan_tpu
from llm_jax.kernels.ssd import tpu as ssd_tpu
from tests.kernels import devices
from tests.kernels.recurrences import make_scan
from tests.kernels.scan_cases import Case, arguments, check_documents, check_numbers, product, program

TILES = {"ssd": ssd_tpu.Tiles(chunk=8, lanes=128), "selective_scan": selective_scan_tpu.Tiles(chunk=16, lanes=128)}
CASES = [
    Case("ssd", "float32", True, True, {"heads": (4, 8), "groups": 1}),
    Case("ssd", "float32", False, False, {"heads": (3, 20), "groups": 3}),
    Case("ssd", "bfloat16", True, False, {"heads": (4, 70), "groups": 1, "states": 130}),
    Case("ssd", "bfloat16", False, True, {"heads": (4, 8), "groups": 2}),
    Case("selective_scan", "float32", True, True, {"channels": 5}),
    Case("selective_scan", "bfloat16", False, False, {"channels": 200, "states": 9}),
]


SIZES = {
    "ssd": [
        {"heads": (4, 8), "groups": 1},
        {"heads": (4, 8), "groups": 2},
        {"heads": (3, 20), "groups": 3},
        {"heads": (2, 70), "groups": 1, "states": 130},
    ],
    "selective_scan": [{"channels": 5}, {"channels": 200, "states": 9}],
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case):
    run = program(case, "tpu", TILES[case.op])
    got = run(*arguments(case))
    check_numbers(case, got)
    if case.packed:
        check_documents(case, run, got)


@pytest.mark.slow
@pytest.mark.parametrize("case", product(SIZES, ["float32", "bfloat16"]), ids=str)
def test_all_numbers(case):
    test_numbers(case)


@pytest.mark.parametrize("op", TILES)
def test_what_a_tpu_runs(op):
    def choice(dtype="bfloat16", length=256, chunk_size=None, **sizes):
        structs = jax.eval_shape(lambda: make_scan(op, jnp.dtype(dtype), batch=1, length=length, **sizes))
        return kernels.explain(op, *structs[:6], chunk_size=chunk_size)

    refused = [
        ({"dtype": "float16"}, "float16"),
        ({"length": 1}, "a single token"),
        ({"states": 65536}, "MiB"),
        ({"chunk_size": 64}, "multiples of 128 tokens"),
    ]
    with devices.target(devices.TPU):
        assert choice().implementation == choice(chunk_size=256).implementation == "tpu"
        for options, words in refused:
            made = choice(**options)
            assert made.implementation == "xla" and words in made.reasons["tpu"]
    assert "not for cpu" in choice().reasons["tpu"]
