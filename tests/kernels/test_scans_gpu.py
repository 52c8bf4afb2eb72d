"""ssd on Hopper GPUs, by the interpreter: uninitialised memory is NaN, races raise."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import kernels
from tests.kernels import devices
from tests.kernels.recurrences import make_scan
from tests.kernels.scan_cases import Case, arguments, check_documents, check_numbers, program

CASES = [
    Case("ssd", "bfloat16", True, True, {"heads": (2, 8), "groups": 1}, length=140),
    Case("ssd", "float16", False, False, {"heads": (1, 70), "groups": 1, "states": 70}, length=260),
    Case("ssd", "bfloat16", False, True, {"heads": (4, 64), "groups": 2}, length=20),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case):
    run = program(case, "gpu", None)
    got = run(*arguments(case))
    check_numbers(case, got)
    if case.packed:
        check_documents(case, run, got)


def test_what_a_gpu_runs():
    def choice(dtype="bfloat16", length=256, chunk_size=None, **sizes):
        structs = jax.eval_shape(lambda: make_scan("ssd", jnp.dtype(dtype), batch=1, length=length, **sizes))
        return kernels.explain("ssd", *structs[:6], chunk_size=chunk_size)

    with devices.target(devices.GPU):
        assert choice().implementation == choice(chunk_size=128).implementation == "gpu"
        for refused, words in [
            (choice("float32"), "not float32"),
            (choice(length=1), "a single token"),
            (choice(states=256), "at most 128 states"),
            (choice(chunk_size=64), "chunks of 128 tokens"),
        ]:
            assert refused.implementation == "xla" and words in refused.reasons["gpu"]
    assert "not for cpu" in choice().reasons["gpu"]
