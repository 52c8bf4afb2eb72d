"""grouped_matmul's TPU kernels in the TPU interpreter: against float64, and what no row may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import explain, grouped_matmul
from llm_jax.kernels.grouped_matmul.tpu import Tiles
from llm_jax.kernels.grouped_matmul.visits import visits
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.grouped import NAMES, ROWS, SIZES, arrays, compiled, formula
from tests.kernels.numerics import assert_float32, assert_half

# Three tiles of rows, two of the weights' first dimension, none of them whole.
K, N, TILES = 130, 20, Tiles(rows=16, summed=128, made=128)


def run(x, w, g, sizes):
    with devices.interpreter("tpu"), trying("grouped_matmul", "tpu", TILES):
        return jax.block_until_ready(compiled("tpu")(x, w, g, sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_products_and_gradients(sizes, dtype):
    """Rows behind the last group, and the weights of groups without rows, are NaN."""
    x, w, g = arrays(dtype, K, N)
    behind, absent = slice(sum(sizes), None), np.flatnonzero(np.array(sizes) == 0)
    got = run(x.at[behind].set(jnp.nan), w.at[absent].set(jnp.nan), g.at[behind].set(jnp.nan), sizes)
    assert all(a.dtype == dtype for a in got)
    reference = compiled("reference")(x, w, g, sizes)
    for name, a, plain, exact in zip(NAMES, got, reference, formula(x, w, g, sizes)):
        if dtype == "float32":
            assert_float32(name, a, exact)
        else:
            assert_half(name, a, plain, exact)


def test_groups_see_only_their_own_rows_and_weights():
    x, w, g = arrays("bfloat16", K, N)
    sizes = SIZES["uneven"]  # rows 21 to 29 are of group 3
    rows, group = slice(21, 30), 3
    before = run(x, w, g, sizes)
    after = run(x.at[rows].multiply(1e4), w.at[group].multiply(1e4), g.at[rows].multiply(1e4), sizes)
    for a, b in zip(before[:2], after[:2]):
        np.testing.assert_array_equal(np.delete(a, np.r_[rows], 0), np.delete(b, np.r_[rows], 0))
    np.testing.assert_array_equal(np.delete(before[2], group, 0), np.delete(after[2], group, 0))


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("tile, align", [(4, 4), (16, 16), (16, 8), (16, 1), (ROWS, ROWS)])
@pytest.mark.parametrize("behind", [True, False])
def test_visits_cover_each_row_once(tile, align, behind, empty):
    """By brute force; with sizes that are negative or too large, too, every visit begins inside the array."""
    for sizes in (*SIZES.values(), [9, -3, 50, 2, 1], [2**30, 2**30, 0, 0, 4]):
        plan = visits(jnp.asarray(sizes), ROWS, tile, align=align, behind=behind, empty=empty)
        count = int(plan.count)
        group, first = np.asarray(plan.group)[:count], np.asarray(plan.first)[:count]
        assert count <= plan.group.shape[0] and (first >= 0).all() and (first < ROWS).all()
        assert not (first % align).any()
        seen = np.full(ROWS, -1)
        for e, at in zip(group, first):
            own = slice(max(at, plan.begin[e]), min(at + tile, plan.end[e]))
            assert (seen[own] == -1).all()
            seen[own] = e
        ends = np.minimum(np.cumsum(np.maximum(sizes, 0)), ROWS)
        want = np.searchsorted(ends, np.arange(ROWS), side="right")
        np.testing.assert_array_equal(seen, np.where((want == 5) & (not behind), -1, want))
        assert (np.diff(group) >= 0).all() and (not empty or set(range(5)) <= set(group))


def test_what_is_refused():
    x, w, _ = arrays("float16", K, N)
    sizes = jnp.zeros(5, jnp.int32)
    with devices.target(devices.TPU):
        assert "float16" in explain(grouped_matmul, x, w, sizes).reasons["tpu"]
        assert explain(grouped_matmul, x.astype("bfloat16"), w.astype("bfloat16"), sizes).implementation == "tpu"
        x, w = x.astype("float32"), w.astype("float32")
        assert "nothing to multiply" in explain(grouped_matmul, x[:0], w, sizes).reasons["tpu"]
    with pytest.raises(UserError, match="written for TPUs, not for cpu"):
        grouped_matmul(x, w, sizes, implementation="tpu")


def test_kernels_are_named():
    x, w, _ = arrays("bfloat16", K, N)
    with devices.target(devices.TPU):
        f = jax.grad(lambda x, w: grouped_matmul(x, w, jnp.zeros(5, jnp.int32)).sum().astype("float32"), (0, 1))
        text = str(jax.make_jaxpr(f)(x, w))
    for name in ("grouped_matmul", "grouped_matmul_input_gradient", "grouped_matmul_weight_gradient"):
        assert f"llm_jax_{name}" in text
