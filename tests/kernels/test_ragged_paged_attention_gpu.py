"""The Hopper kernel of ragged_paged_attention in the interpreter: memory that starts as NaN, races that raise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import ragged_paged_attention
from llm_jax.kernels.ragged_paged_attention import gpu
from tests.kernels import devices, paged
from tests.kernels.numerics import assert_float32, assert_half
from tests.kernels.pairwise import covering

OPTIONS = paged.OPTIONS | {"dtype": ("bfloat16", "float16"), "page": (16, 64)}
FEW = OPTIONS | {"dtype": ("bfloat16",), "batch": ("decode", "mixed"), "heads": ((1, 4),), "values": ("same",)}
CASES = covering(FEW)[:6] + [  # the interpreter takes seconds for each; all pairs are in the slow ones
    dict(zip(OPTIONS, values, strict=True))
    for values in (
        ("prefill", "bfloat16", None, 32, (2, 3), "other", 6, None, True, True, True),
        ("decode", "bfloat16", "int8", 32, (1, 4), "latent", None, 2.0, False, False, False),
        ("mixed", "bfloat16", None, 32, (1, 4), "latent", 6, None, False, True, False),
    )
]
MORE = [case for case in covering(OPTIONS, paged.allowed) if case not in CASES]


def run(args, options, implementation, **more):
    with devices.interpreter(implementation):
        return jax.jit(lambda *args: ragged_paged_attention(*args, implementation=implementation, **options, **more))(
            *args
        )


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=paged.name
)
def test_equals_the_formula(case, monkeypatch):
    if case["lse"]:
        monkeypatch.setattr(gpu, "num_splits", lambda tiles, blocks: 2)
    args, options, kept = paged.make(case, head_dim=128 if case["values"] == "latent" else 64, value_dim=128)
    want_out, want_lse = paged.formula(args, options, kept)
    got = run(args, options, "gpu", return_lse=case["lse"])
    out, lse = got if case["lse"] else (got, None)
    assert_half("out", out, run(args, options, "reference"), want_out)
    if lse is not None:
        assert_float32("lse", lse, want_lse)


def test_few_tiles_share_their_keys_among_the_processors():
    assert gpu.num_splits(tiles=132, blocks=128) == 1
    assert gpu.num_splits(tiles=8, blocks=4) == 1
    assert gpu.num_splits(tiles=8, blocks=128) == 14  # 112 of 132; 16 is full to 97% but more parts
    assert gpu.num_splits(tiles=64, blocks=128) == 2
    assert gpu.num_splits(tiles=8, blocks=6) == 6


def test_parts_are_put_together_by_their_log_sum_exps():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(4, 30)), rng.normal(size=(30, 5))
    weights = np.exp(scores)
    cuts = [slice(0, 7), slice(7, 7), slice(7, 30)]
    lse = np.stack([np.log(weights[:, cut].sum(1)) if cut.start < cut.stop else np.full(4, -np.inf) for cut in cuts])
    out = np.stack([weights[:, cut] @ values[cut] / max(1e-30, 1) for cut in cuts])
    out = out / np.where(np.isfinite(lse), np.exp(lse), 1.0)[..., None]
    got_out, got_lse = gpu.combined(jnp.asarray(out), jnp.asarray(lse))
    np.testing.assert_allclose(got_out[0], weights @ values / weights.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(got_lse[0], np.log(weights.sum(1)), atol=1e-6)


def test_slots_that_no_token_sees_change_nothing():
    case = CASES[0] | {"batch": "mixed", "packed": None, "page": 32, "window": 6}
    (q, pages, *rest), options, _ = paged.make(case, head_dim=64, value_dim=128)
    other = paged.changed(pages, paged.unseen(case, (q, pages, *rest)), 1e4)
    with devices.interpreter("gpu"):
        attend = jax.jit(lambda pages: ragged_paged_attention(q, pages, *rest, implementation="gpu", **options))
        np.testing.assert_array_equal(attend(pages), attend(other))
