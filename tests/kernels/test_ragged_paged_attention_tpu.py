"""The TPU kernel of ragged_paged_attention in the interpreter: memory that starts as NaN, races that raise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import init_pages, ragged_paged_attention, supports
from llm_jax.kernels.ragged_paged_attention.tpu import Sizes
from llm_jax.kernels.tiles import trying
from tests.kernels import devices, paged
from tests.kernels.numerics import assert_float32, assert_half
from tests.kernels.pairwise import covering

OPTIONS = paged.OPTIONS | {"dtype": ("bfloat16", "float32"), "page": (32, 64)}
FEW = OPTIONS | {"page": (32,), "batch": ("decode", "mixed"), "heads": ((1, 4),), "values": ("same",)}
CASES = covering(FEW) + [
    dict(zip(OPTIONS, values, strict=True))
    for values in (
        ("prefill", "bfloat16", None, 32, (2, 3), "other", 6, None, True, True, True),
        ("decode", "bfloat16", "int8", 32, (1, 4), "latent", None, 2.0, False, False, False),
        ("mixed", "bfloat16", None, 32, (1, 4), "latent", 6, None, False, True, False),
    )
]
SIZES = Sizes(rows=16, block=32)
MORE = [case for case in covering(OPTIONS, paged.allowed) if case not in CASES]


def run(args, options, implementation, **more):
    with devices.interpreter(implementation), trying("ragged_paged_attention", "tpu", SIZES):
        return jax.jit(lambda *args: ragged_paged_attention(*args, implementation=implementation, **options, **more))(
            *args
        )


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=paged.name
)
def test_equals_the_formula(case):
    args, options, kept = paged.make(case, multiple=128)
    want_out, want_lse = paged.formula(args, options, kept)
    got = run(args, options, "tpu", return_lse=case["lse"])
    out, lse = got if case["lse"] else (got, None)
    if case["dtype"] == "float32":
        assert_float32("out", out, want_out)
    else:
        assert_half("out", out, run(args, options, "reference"), want_out)
    if lse is not None:
        assert_float32("lse", lse, want_lse)


def test_slots_that_no_token_sees_change_nothing():
    case = CASES[0] | {"batch": "mixed", "packed": None, "page": 32, "window": 6}
    (q, pages, *rest), options, _ = paged.make(case, multiple=128)
    other = paged.changed(pages, paged.unseen(case, (q, pages, *rest)), 1e4)
    with devices.interpreter("tpu"), trying("ragged_paged_attention", "tpu", SIZES):
        attend = jax.jit(lambda pages: ragged_paged_attention(q, pages, *rest, implementation="tpu", **options))
        np.testing.assert_array_equal(attend(pages), attend(other))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"platform": "cpu"}, "written for TPUs, not for cpu"),
        ({"dtype": "float16"}, "float16"),
        ({"multiple": 1}, "slots (64, 64) wide are no multiples of 128"),
        ({"page": 8}, "page size 8 is no multiple of 16"),
        ({"table": 2**17}, "page ids"),
        # A tile for each token: as many heads as a tile has rows.
        ({"tokens": 2**15, "heads": 256}, "5 numbers of 32768 tiles"),
        ({"kv_heads": 512, "heads": 512, "page": 128}, "two pages of 128 slots and 512 heads"),
    ],
)
def test_what_is_refused(change, reason):
    call = dict(platform="tpu", dtype="bfloat16", multiple=128, page=16, table=2**15, tokens=64, heads=8, kv_heads=1)
    call |= change
    tokens, heads, table = call["tokens"], call["heads"], call["table"]
    pages = jax.eval_shape(
        lambda: init_pages(4, call["page"], call["kv_heads"], 64, dtype=call["dtype"], multiple=call["multiple"])
    )
    q = jax.ShapeDtypeStruct((tokens, heads, 64), call["dtype"])
    arrays = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), (4, table), (5,)))
    said = supports("ragged_paged_attention", q, pages, *arrays, implementation="tpu", platform=call["platform"])
    assert said is None if reason is None else reason in (said or "")
