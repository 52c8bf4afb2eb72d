"""selective_scan and ssd on Hopper GPUs, by the interpreter: uninitialised memory is NaN, races raise."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import kernels
from llm_jax.kernels.selective_scan.gpu import Tiles
from tests.kernels import devices
from tests.kernels.recurrences import make_scan
from tests.kernels.scan_cases import Case, arguments, check_documents, check_numbers, product, program

CASES = [
    Case("ssd", "bfloat16", True, True, {"heads": (2, 8), "groups": 1}, length=140),
    Case("ssd", "float16", False, False, {"heads": (1, 70), "groups": 1, "states": 70}),
    Case("ssd", "bfloat16", False, True, {"heads": (4, 64), "groups": 2}),
    Case("selective_scan", "float32", True, True, {"channels": 5}, length=12),
]
SHORT = Tiles(chunk=8)
"""Two chunks of few tokens, which the interpreter takes one after another; documents begin inside both."""

SSD_SIZES = [
    {"heads": (2, 8), "groups": 1},
    {"heads": (4, 64), "groups": 2},
    {"heads": (1, 70), "states": 70, "groups": 1},
]
SCAN_SIZES = [{"channels": 5}, {"channels": 130, "states": 9}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case):
    check(case, SHORT if case.op == "selective_scan" else None)


def check(case, sizes):
    run = program(case, "gpu", sizes)
    got = run(*arguments(case))
    check_numbers(case, got)
    if case.packed:
        check_documents(case, run, got)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *product({"ssd": SSD_SIZES}, ["bfloat16", "float16"], length=140),
        *product({"selective_scan": SCAN_SIZES}, ["float32", "bfloat16", "float16"], length=40),
    ],
    ids=str,
)
def test_all_numbers(case):
    check(case, None)


@pytest.mark.parametrize(
    "op, sizes, refused",
    [
        (
            "ssd",
            [128],
            [
                ({"dtype": "float32"}, "not float32"),
                ({"states": 256}, "at most 128 states"),
                ({"chunk_size": 64}, "chunks of 128 tokens, not of 64"),
            ],
        ),
        (
            "selective_scan",
            [4, 8, 32],
            [
                ({"states": 17}, "at most 16 states"),
                ({"chunk_size": 64}, "at most 32, not of 64"),
                ({"chunk_size": 10}, "multiple of 4 tokens"),
            ],
        ),
    ],
)
def test_what_a_gpu_runs(op, sizes, refused):
    def choice(dtype="bfloat16", length=256, chunk_size=None, **sizes):
        structs = jax.eval_shape(lambda: make_scan(op, jnp.dtype(dtype), batch=1, length=length, **sizes))
        return kernels.explain(op, *structs[:6], chunk_size=chunk_size)

    refused = [*refused, ({"length": 1}, "a single token")]
    with devices.target(devices.GPU):
        assert {choice(chunk_size=size).implementation for size in (None, *sizes)} == {"gpu"}
        for options, words in refused:
            made = choice(**options)
            assert made.implementation == "xla" and words in made.reasons["gpu"]
    assert "not for cpu" in choice().reasons["gpu"]
