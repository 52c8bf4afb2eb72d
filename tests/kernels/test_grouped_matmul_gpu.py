"""grouped_matmul's GPU kernels in the GPU interpreter: against float64, and what no row may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import explain, grouped_matmul
from llm_jax.kernels.grouped_matmul.gpu import Tiles
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.grouped import NAMES, arrays, compiled, formula
from tests.kernels.numerics import assert_half

# Two tiles of rows for the largest group; 64 rows are a step of the weight gradient.
ROWS, K, N, TILES = 212, 72, 68, Tiles(width=64, stages=2, band=2)
SIZES = {
    "uneven": [3, 140, 1, 9, 59],
    "empty groups, rows behind": [0, 70, 0, 77, 0],
    "nothing": [0, 0, 0, 0, 0],
}


def run(x, w, g, sizes):
    with devices.interpreter("gpu", devices.SMALL_GPU), trying("grouped_matmul", "gpu", TILES):
        return jax.block_until_ready(compiled("gpu")(x, w, g, sizes))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_products_and_gradients(sizes):
    """Rows behind the last group, and the weights of groups without rows, are NaN."""
    x, w, g = arrays("bfloat16", K, N, rows=ROWS)
    behind, absent = slice(sum(sizes), None), np.flatnonzero(np.array(sizes) == 0)
    got = run(x.at[behind].set(jnp.nan), w.at[absent].set(jnp.nan), g.at[behind].set(jnp.nan), sizes)
    assert all(a.dtype == jnp.bfloat16 for a in got)
    reference = compiled("reference")(x, w, g, sizes)
    for name, a, plain, exact in zip(NAMES, got, reference, formula(x, w, g, sizes)):
        assert_half(name, a, plain, exact)


@pytest.mark.slow
def test_fewer_rows_than_a_tile_in_float16():
    x, w, g = arrays("float16", K, N)
    sizes = [7, 0, 11, 0, 5]
    got, reference = run(x, w, g, sizes), compiled("reference")(x, w, g, sizes)
    for name, a, plain, exact in zip(NAMES, got, reference, formula(x, w, g, sizes)):
        assert_half(name, a, plain, exact)


def test_groups_see_only_their_own_rows_and_weights():
    x, w, g = arrays("bfloat16", K, N, rows=ROWS)
    sizes = SIZES["uneven"]  # rows 144 to 152 are of group 3
    rows, group = slice(144, 153), 3
    before = run(x, w, g, sizes)
    after = run(x.at[rows].set(jnp.nan), w.at[group].set(jnp.nan), g.at[rows].multiply(1e4), sizes)
    for a, b in zip(before[:2], after[:2]):
        np.testing.assert_array_equal(np.delete(a, np.r_[rows], 0), np.delete(b, np.r_[rows], 0))
    np.testing.assert_array_equal(np.delete(before[2], group, 0), np.delete(after[2], group, 0))


def test_what_is_refused():
    x, w, _ = arrays("float32", K, N)
    sizes = jnp.zeros(5, jnp.int32)
    with devices.target(devices.GPU):
        assert "not float32" in explain(grouped_matmul, x, w, sizes).reasons["gpu"]
        half = x.astype("float16"), w.astype("float16")
        assert explain(grouped_matmul, *half, sizes).implementation == "gpu"
        assert "nothing to multiply" in explain(grouped_matmul, half[0][:0], half[1], sizes).reasons["gpu"]
    assert explain(grouped_matmul, *half, sizes).reasons["gpu"] == "written for Hopper GPUs, not for cpu"


def test_kernels_are_named():
    x, w, _ = arrays("bfloat16", K, N)
    with devices.target(devices.GPU):
        f = jax.grad(lambda x, w: grouped_matmul(x, w, jnp.zeros(5, jnp.int32)).sum().astype("float32"), (0, 1))
        text = str(jax.make_jaxpr(f)(x, w))
    for name in ("grouped_matmul", "grouped_matmul_input_gradient", "grouped_matmul_weight_gradient"):
        assert f"llm_jax_{name}" in text
