"""flash_attention's TPU kernels in the TPU interpreter: against float64, and what no query may see."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention.tpu import Tiles
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.attention_cases import OPTIONS, compiled, cotangents, formula, make_case, numpy_mask
from tests.kernels.numerics import assert_float32, assert_half, distance
from tests.kernels.pairwise import covering, everything

TILES = Tiles(*[128] * 6)
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
"""Interpreters compile longer than they run."""


PER_HEAD = {"bfloat16": 1e-2, "float16": 2e-3}
"""Gradients of slopes and sinks are few numbers, sums that cancel; the saved output that they need is rounded."""


def check(case):
    """Against the formula, with NaN in all that nobody sees; then again with numbers there and one key far larger:
    queries that may not see this key get the same bits."""
    arrays, options = make_case(**case)
    d_out, d_lse = cotangents(arrays)
    (B, T), S = arrays["q"].shape[:2], arrays["k"].shape[1]
    seen = numpy_mask(options, B, T, S)
    unseen = {"q": ~seen.any(2), "k": ~seen.any(1), "v": ~seen.any(1)}
    holes = {name: jnp.where(unseen[name][:, :, None, None], jnp.nan, arrays[name]) for name in "qkv"}
    key = int(np.abs(seen.sum((0, 1)) - B * T / 2).argmin())  # that some see and some do not, if there is one
    changed = {name: arrays[name].at[:, key].multiply(1e4) for name in "kv"}
    run = compiled(options, "tpu", QUICK)
    with devices.interpreter("tpu"), trying("flash_attention", "tpu", TILES):
        got = run(arrays | holes, d_out, d_lse)
        again = run(arrays | changed, d_out, d_lse)
    exact = formula(arrays, options, seen, d_out, d_lse)
    plain = compiled(options, "reference")(arrays, d_out, d_lse)
    for name, x in got.items():
        assert x.dtype == plain[name].dtype
        if name == "lse" or case["dtype"] == "float32":
            assert_float32(name, x, exact[name])
        elif name in "qkv" or name == "out":
            assert_half(name, x, plain[name], exact[name])
        else:
            assert distance(x, exact[name]) < PER_HEAD[case["dtype"]], name
    untouched = ~seen[:, :, key]
    for name in ("out", "lse", "q"):
        np.testing.assert_array_equal(np.asarray(again[name])[untouched], np.asarray(got[name])[untouched], name)
    assert not untouched.all() and not np.array_equal(again["out"], got["out"])


@pytest.mark.parametrize("case", covering(OPTIONS), ids=lambda case: "-".join(str(x) for x in case.values()))
def test_every_pair_of_options(case):
    check(case)


@pytest.mark.slow
def test_every_combination_of_options():
    small = OPTIONS | {"sizes": [(16, 24)], "heads": [(4, 2)], "dtype": ["float32", "bfloat16"]}
    for case in everything(small):
        check(case)
