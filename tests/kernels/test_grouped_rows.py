"""Rows that grouped_matmul and grouped_swiglu take from tokens: results and gradients against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import debug, grouped_matmul, grouped_swiglu
from llm_jax.kernels.grouped_matmul import gpu, tpu
from llm_jax.kernels.grouped_matmul.gpu_rows import in_block
from llm_jax.kernels.grouped_matmul.tokens import BLOCK, sums_of_tokens
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.grouped import SIZES
from tests.kernels.numerics import assert_numbers
from tests.kernels.pairwise import covering
from tests.kernels.test_grouped_matmul import formula as products
from tests.kernels.test_grouped_swiglu import HOPPER_SIZES
from tests.kernels.test_grouped_swiglu import formula as gated

ROWS, HOPPER_ROWS = 45, 212
SHAPES = {"xla": (12, 20), "tpu": (300, 20), "gpu": (200, 60)}
# Three tiles of rows; two steps for each half of the columns, the last of them behind the last column. On Hopper two
# tiles of rows for the largest group, and more steps than stages.
TILES = {"tpu": tpu.Tiles(rows=16, summed=256, made=128), "gpu": gpu.Tiles(width=64, stages=3, band=2)}
OPS = {
    "grouped_matmul": (grouped_matmul, products, ("product", "gradient of x", "gradient of w")),
    "grouped_swiglu": (grouped_swiglu, gated, ("product", "gradient of x", "gradient of gate", "gradient of up")),
}
NAMED = "even", "uneven", "one"
"""Each token by as many rows; some by many rows and some by none; all rows of one token."""


def chosen(named, rows=ROWS):
    """For each row its token, and how many tokens there are."""
    rng = np.random.default_rng(1)
    copies = 3 if rows % 3 == 0 else 4
    tokens = rows // copies
    if named == "even":
        return rng.permutation(np.repeat(np.arange(tokens), copies)), tokens
    return (rng.integers(0, tokens, rows) // 2 * 2 if named == "uneven" else np.full(rows, 3)), tokens


def arrays(op, dtype, tokens, implementation="xla", rows=ROWS):
    """x, the weights, and the cotangent of the result."""
    K, N = SHAPES[implementation]
    rng = np.random.default_rng(0)
    weights = [((5, K, N), K**-0.5)] * (1 if op == "grouped_matmul" else 2)
    shapes = ((tokens, K), 1.0), *weights, ((rows, N), 1.0)
    return tuple(jnp.asarray(scale * rng.normal(size=shape), dtype) for shape, scale in shapes)


@functools.cache
def compiled(op, implementation, gradients):
    """(rows, sizes, x, *weights, g) -> the result, and the gradients."""

    @jax.jit
    def run(rows, sizes, x, *more):
        *weights, g = more
        call = functools.partial(OPS[op][0], group_sizes=sizes, rows=rows, implementation=implementation)
        if not gradients:
            return (call(x, *weights),)
        out, pull = jax.vjp(call, x, *weights)
        return out, *pull(g)

    return run


def run(op, implementation, rows, sizes, *args, gradients=True):
    tiles, call = TILES.get(implementation), compiled(op, implementation, gradients)
    with devices.interpreter(implementation, devices.SMALL_GPU), trying("grouped_swiglu", implementation, tiles):
        with trying("grouped_matmul", implementation, tiles):
            return jax.block_until_ready(call(jnp.asarray(rows), jnp.asarray(sizes), *args))


def formula(op, rows, sizes, x, *more):
    """In float64."""
    out, d_rows, *d_weights = OPS[op][1](np.asarray(x, np.float64)[rows], *more, sizes)
    d_x = np.zeros(x.shape)
    np.add.at(d_x, rows, d_rows)
    return out, d_x, *d_weights


# Of an op, an implementation and a dtype any two meet that can, but for the slow ones.
PROGRAMS = {
    ("grouped_matmul", "xla", "float32"),
    ("grouped_matmul", "tpu", "bfloat16"),
    ("grouped_matmul", "gpu", "float16"),
    ("grouped_swiglu", "tpu", "float32"),
    ("grouped_swiglu", "xla", "bfloat16"),
    ("grouped_swiglu", "xla", "float16"),
}
OPTIONS = {
    "op": list(OPS),
    "sizes": ["uneven", "empty groups", "rows behind", "nothing"],
    "implementation": ["xla", "tpu", "gpu"],
    "dtype": ["float32", "bfloat16", "float16"],
    "named": NAMED,
}
CASES = covering(OPTIONS, lambda case: (case["op"], case["implementation"], case["dtype"]) in PROGRAMS)
SLOW = covering(OPTIONS | {"implementation": ["gpu"], "dtype": ["bfloat16", "float16"]})


def name(case):
    return "-".join(case.values())


def check(op, sizes, implementation, dtype, named, small=False, gradients=True):
    """Tokens that no row of a group names, and the weights of groups without rows, are NaN."""
    small = small or implementation != "gpu"
    sizes = (SIZES if small else HOPPER_SIZES)[sizes]
    rows, tokens = chosen(named, ROWS if small else HOPPER_ROWS)
    x, *weights, g = arrays(op, dtype, tokens, implementation, len(rows))
    unseen = np.setdiff1d(np.arange(tokens), rows[: sum(sizes)])
    absent, behind = np.flatnonzero(np.array(sizes) == 0), slice(sum(sizes), None)
    hidden = x.at[unseen].set(jnp.nan), *(w.at[absent].set(jnp.nan) for w in weights), g.at[behind].set(jnp.nan)
    got, plain = (
        run(op, implementation, rows, sizes, *hidden, gradients=gradients),
        run(op, "reference", rows, sizes, x, *weights, g, gradients=gradients),
    )
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
    exact = formula(op, rows, sizes, x, *weights, g)
    assert_numbers(OPS[op][2][: len(got)], got, plain, exact[: len(got)], dtype)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_results_and_gradients(case):
    check(**case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=name)
def test_results_and_gradients_on_hopper(case):
    check(**case)


@pytest.mark.parametrize(("implementation", "dtype"), [("xla", "float32"), ("tpu", "bfloat16"), ("gpu", "bfloat16")])
def test_grouped_swiglu_that_is_not_differentiated(implementation, dtype):
    """In one kernel that does not write the products; on Hopper, of fewer rows than a tile has."""
    check("grouped_swiglu", "rows behind", implementation, dtype, "uneven", small=True, gradients=False)


@pytest.mark.parametrize("named", NAMED)
def test_gradients_are_the_same_every_time(named):
    rows, tokens = chosen(named)
    args = arrays("grouped_matmul", "float32", tokens)
    first, second = (run("grouped_matmul", "xla", rows, SIZES["uneven"], *args) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("width", [64, 128])
def test_where_a_block_has_its_pieces(width):
    """As TMA writes matrices: tile by tile, with the bits 4 to 6 of an address changed by the bits 7 to 9."""
    rows, pieces = np.divmod(np.arange(128 * 8), width // 8)
    tile, column = np.divmod(pieces * 8, 64)
    plain = 2 * ((rows // 8 * (width // 64) + tile) * 512 + rows % 8 * 64 + column)
    np.testing.assert_array_equal(2 * in_block(rows, pieces, width), plain ^ (plain >> 7 & 7) << 4)


@pytest.mark.parametrize(("more", "columns"), [(0, 7), (7, 7), (7, BLOCK + 3)])
@pytest.mark.parametrize("named", NAMED)
def test_sums_of_tokens(named, more, columns):
    """By brute force. No scatter adds, and what no row of a token holds does not reach its sum."""
    rows, tokens = chosen(named)
    tokens += more
    parts = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, columns)), jnp.float32)
    bad = parts.at[rows == rows[0]].set(jnp.nan)
    total = functools.partial(sums_of_tokens, rows=jnp.asarray(rows), tokens=tokens)
    exact = np.zeros((tokens, columns))
    np.add.at(exact, rows, parts)
    np.testing.assert_allclose(total(parts), exact, atol=1e-5)
    found = np.isnan(total(bad)).all(1)
    np.testing.assert_array_equal(np.flatnonzero(found), rows[:1])
    assert "scatter" not in str(jax.make_jaxpr(total)(parts))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_any_integers(dtype):
    """More tokens, and more rows of all groups, than a narrow dtype counts to."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(300, 4)), rng.normal(size=(3, 4, 2))
    rows, sizes = rng.integers(0, 120, 300), np.full(3, 100)
    want = np.concatenate([x[part] @ w[e] for e, part in enumerate(np.split(rows, 3))])
    tokens, weights = (jnp.asarray(a, jnp.float32) for a in (x, w))
    got = grouped_matmul(tokens, weights, jnp.asarray(sizes, dtype), rows=jnp.asarray(rows, dtype))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_sizes_past_all_integers():
    """Cut to what is there, out of debug mode."""
    x, w = jnp.ones((6, 2)), jnp.arange(1.0, 4.0)[:, None, None] * jnp.ones((1, 2, 1))
    for sizes, groups in (
        ([2, 2**31 - 1, 2**31 - 1], [1, 1, 2, 2, 2, 2]),
        ([-(2**31), 3, 2**31 - 1], [2, 2, 2, 3, 3, 3]),
    ):
        np.testing.assert_array_equal(grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32))[:, 0], 2.0 * np.array(groups))


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
