"""grouped_matmul: both implementations and their gradients against numpy in float64, group by group."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import debug, grouped_matmul
from tests.kernels.grouped import NAMES, SIZES, arrays, compiled, formula
from tests.kernels.numerics import assert_numbers

K, N = 12, 20


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_and_gradients(dtype, implementation, sizes):
    x, w, g = arrays(dtype, K, N)
    got, plain = (compiled(name)(x, w, g, sizes) for name in (implementation, "reference"))
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
    assert_numbers(NAMES, got, plain, formula(x, w, g, sizes), dtype, limit=1e-6)


def test_more_groups_than_rows():
    x, _, g = arrays("float32", K, N)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(64, K, N)), jnp.float32)
    sizes = np.zeros(64, np.int32)
    sizes[[3, 40, 63]] = 2, 1, 4
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes)), x, w)
    for got, want in zip((out, *pull(g)), formula(x, w, g, sizes)):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_numpy_arrays(implementation):
    x, w, g = arrays("float32", K, N)
    sizes = SIZES["uneven"]
    given: list[Any] = [np.asarray(x), np.asarray(w), np.asarray(sizes, np.int32)]
    out = grouped_matmul(*given, implementation=implementation)
    np.testing.assert_allclose(out, formula(x, w, g, sizes)[0], atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_behind_the_last_group_may_hold_anything(implementation):
    x, w, g = arrays("float32", K, N)
    sizes = jnp.asarray(SIZES["rows behind"], jnp.int32)
    bad = x.at[23:].set(jnp.nan), g.at[23:].set(jnp.nan)
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), bad[0], w)
    for got, want in zip((out, *pull(bad[1])), formula(x, w, g, SIZES["rows behind"])):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, n: (x[0], w, n), r"x \(12,\) must be \[M, K\]"),
        (lambda x, w, n: (x, w[:, :5], n), r"w \(5, 5, 20\) \[E, K, N\]"),
        (lambda x, w, n: (x, w[:0], n[:0]), r"w \(0, 12, 20\) must have at least one group"),
        (lambda x, w, n: (x, w.astype("bfloat16"), n), "must share one dtype"),
        (lambda x, w, n: (x, w, n[:2]), r"group_sizes must be integers \[5\]"),
        (lambda x, w, n: (x, w, n * 1.0), r"group_sizes must be integers \[5\]; got float32"),
    ],
)
def test_bad_calls_name_the_argument(change, message):
    x, w, _ = arrays("float32", K, N)
    with pytest.raises(UserError, match=message):
        grouped_matmul(*change(x, w, jnp.asarray(SIZES["uneven"])))


@pytest.mark.parametrize("sizes", [[3, -1, 1, 9, 15], [3, 17, 1, 9, 16]], ids=["negative", "beyond the rows"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_group_sizes_that_are_not_there(implementation, sizes):
    """Named in debug mode, at once and from a compiled program; cut to the rows that are there out of it."""
    x, w, g = arrays("float32", K, N)
    message = r"add up to 45 at most; got \[3, "
    with debug.checking(), pytest.raises(UserError, match=message):
        grouped_matmul(x, w, jnp.asarray(sizes), implementation=implementation)
    with debug.checking(), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run = jax.jit(lambda sizes: grouped_matmul(x, w, sizes, implementation=implementation))
        jax.block_until_ready(run(jnp.asarray(sizes)))
        jax.effects_barrier()
    there = np.maximum(sizes, 0)
    there[-1] = min(there[-1], 45 - there[:-1].sum())
    for got, want in zip(compiled(implementation)(x, w, g, sizes), formula(x, w, g, there)):
        np.testing.assert_allclose(got, want, atol=1e-5)
