"""Rows that grouped_matmul and grouped_swiglu take from tokens: results and gradients against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import debug, grouped_matmul, grouped_swiglu
from llm_jax.kernels.grouped_matmul import tpu
from llm_jax.kernels.grouped_matmul.tokens import sums_of_tokens
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.grouped import SIZES
from tests.kernels.numerics import assert_numbers
from tests.kernels.pairwise import covering
from tests.kernels.test_grouped_matmul import formula as products
from tests.kernels.test_grouped_swiglu import formula as gated

ROWS = 45
SHAPES = {"xla": (12, 20), "tpu": (300, 20)}
# Three tiles of rows; two steps for each half of the columns, the last of them behind the last column.
TILES = {"tpu": tpu.Tiles(rows=16, summed=256, made=128)}
OPS = {
    "grouped_matmul": (grouped_matmul, products, ("product", "gradient of x", "gradient of w")),
    "grouped_swiglu": (grouped_swiglu, gated, ("product", "gradient of x", "gradient of gate", "gradient of up")),
}
NAMED = "even", "uneven", "one"
"""Each token by as many rows; some by many rows and some by none; all rows of one token."""


def chosen(named, rows=ROWS):
    """For each row its token, and how many tokens there are."""
    rng = np.random.default_rng(1)
    if named == "even":
        return rng.permutation(np.repeat(np.arange(rows // 3), 3)), rows // 3
    tokens = rows // 2
    return (rng.integers(0, tokens, rows) // 2 * 2 if named == "uneven" else np.full(rows, 3)), tokens


def arrays(op, dtype, tokens, implementation="xla"):
    """x, the weights, and the cotangent of the result."""
    K, N = SHAPES.get(implementation, SHAPES["xla"])
    rng = np.random.default_rng(0)
    weights = [((5, K, N), K**-0.5)] * (1 if op == "grouped_matmul" else 2)
    shapes = ((tokens, K), 1.0), *weights, ((ROWS, N), 1.0)
    return tuple(jnp.asarray(scale * rng.normal(size=shape), dtype) for shape, scale in shapes)


@functools.cache
def compiled(op, implementation):
    """(rows, sizes, x, *weights, g) -> the result and the gradients."""

    @jax.jit
    def run(rows, sizes, x, *more):
        *weights, g = more
        call = functools.partial(OPS[op][0], group_sizes=sizes, rows=rows, implementation=implementation)
        out, pull = jax.vjp(call, x, *weights)
        return out, *pull(g)

    return run


def run(op, implementation, rows, sizes, *args):
    tiles = TILES.get(implementation)
    with devices.interpreter(implementation), trying("grouped_swiglu", implementation, tiles):
        with trying("grouped_matmul", implementation, tiles):
            return jax.block_until_ready(compiled(op, implementation)(jnp.asarray(rows), jnp.asarray(sizes), *args))


def formula(op, rows, sizes, x, *more):
    """In float64."""
    out, d_rows, *d_weights = OPS[op][1](np.asarray(x, np.float64)[rows], *more, sizes)
    d_x = np.zeros(x.shape)
    np.add.at(d_x, rows, d_rows)
    return out, d_x, *d_weights


CASES = covering(
    {
        "op": list(OPS),
        "sizes": ["uneven", "empty groups", "rows behind", "nothing"],
        "implementation": ["xla", "tpu"],
        "dtype": ["float32", "bfloat16", "float16"],
        "named": NAMED,
    },
    lambda case: not (case["implementation"] == "tpu" and case["dtype"] == "float16"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_results_and_gradients(case):
    """Tokens that no row of a group names, and the weights of groups without rows, are NaN."""
    op, sizes, dtype = case["op"], SIZES[case["sizes"]], case["dtype"]
    rows, tokens = chosen(case["named"])
    x, *weights, g = arrays(op, dtype, tokens, case["implementation"])
    unseen = np.setdiff1d(np.arange(tokens), rows[: sum(sizes)])
    absent, behind = np.flatnonzero(np.array(sizes) == 0), slice(sum(sizes), None)
    hidden = x.at[unseen].set(jnp.nan), *(w.at[absent].set(jnp.nan) for w in weights), g.at[behind].set(jnp.nan)
    got, plain = (
        run(op, case["implementation"], rows, sizes, *hidden),
        run(op, "reference", rows, sizes, x, *weights, g),
    )
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
    assert_numbers(OPS[op][2], got, plain, formula(op, rows, sizes, x, *weights, g), dtype)


@pytest.mark.parametrize("named", NAMED)
def test_gradients_are_the_same_every_time(named):
    rows, tokens = chosen(named)
    args = arrays("grouped_matmul", "float32", tokens)
    first, second = (run("grouped_matmul", "xla", rows, SIZES["uneven"], *args) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("named", NAMED)
def test_sums_of_tokens(named):
    """By brute force. No scatter adds, and what no row of a token holds does not reach its sum."""
    rows, tokens = chosen(named)
    parts = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, 7)), jnp.float32)
    bad = parts.at[rows == rows[0]].set(jnp.nan)
    total = functools.partial(sums_of_tokens, rows=jnp.asarray(rows), tokens=tokens)
    exact = np.zeros((tokens, 7))
    np.add.at(exact, rows, parts)
    np.testing.assert_allclose(total(parts), exact, atol=1e-5)
    found = np.isnan(total(bad)).all(1)
    np.testing.assert_array_equal(np.flatnonzero(found), rows[:1])
    assert "scatter" not in str(jax.make_jaxpr(total)(parts))


def test_no_rows_at_all():
    x, w, _ = arrays("grouped_matmul", "float32", 9)
    none = jnp.zeros(0, jnp.int32), jnp.zeros(5, jnp.int32)
    for tokens in (x, x[:0]):
        out, pull = jax.vjp(lambda x: grouped_matmul(x, w, none[1], rows=none[0]), tokens)
        assert out.shape == (0, w.shape[2])
        np.testing.assert_array_equal(pull(out)[0], np.zeros(tokens.shape))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, rows: (x, rows[None]), r"rows must be integers \[M\]; got int32\[1, 45\]"),
        (lambda x, rows: (x, rows * 1.0), r"rows must be integers \[M\]; got float32\[45\]"),
        (lambda x, rows: (x[0], rows), r"x \(12,\) must be \[T, K\]"),
        (lambda x, rows: (x[:0], rows), r"rows \(45,\) can't be taken from x \(0, 12\)"),
    ],
)
def test_bad_calls_name_the_argument(op, change, message):
    rows, tokens = chosen("even")
    x, *weights, _ = arrays(op, "float32", tokens)
    x, rows = change(x, jnp.asarray(rows, jnp.int32))
    with pytest.raises(UserError, match=f"{op}: {message}"):
        OPS[op][0](x, *weights, jnp.asarray(SIZES["uneven"]), rows=rows)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_that_are_not_there(implementation, op):
    """Named in debug mode, at once and from a compiled program; out of it the first or the last token's."""
    rows, tokens = chosen("uneven")
    x, *weights, g = arrays(op, "float32", tokens)
    rows[[5, 9]] = -3, tokens
    sizes = jnp.asarray(SIZES["uneven"])
    call = lambda rows: OPS[op][0](x, *weights, sizes, rows=rows, implementation=implementation)  # noqa: E731
    message = rf"{op}: rows must be in \[0, {tokens}\); got -3 to {tokens}"
    with debug.checking(), pytest.raises(UserError, match=message):
        call(jnp.asarray(rows))
    with debug.checking(), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(call)(jnp.asarray(rows)))
        jax.effects_barrier()
    there = np.clip(rows, 0, tokens - 1)
    got = run(op, implementation, rows, SIZES["uneven"], x, *weights, g)
    for a, want in zip(got, formula(op, there, SIZES["uneven"], x, *weights, g), strict=True):
        np.testing.assert_allclose(a, want, atol=1e-5)
