"""grouped_swiglu: the implementations and their gradients against numpy in float64, group by group."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import debug, explain, grouped_swiglu
from llm_jax.kernels.grouped_matmul import gpu, tpu
from llm_jax.kernels.grouped_swiglu import SAVED
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.grouped import SIZES
from tests.kernels.numerics import assert_numbers
from tests.kernels.pairwise import covering

NAMES = "product", "input gradient", "gradient of gate", "gradient of up"
# Three tiles of rows, two of each dimension of the weights, none of them whole; on Hopper two, and two steps of each
# product, for the largest group.
TILES = {"tpu": tpu.Tiles(rows=16, summed=128, made=128), "gpu": gpu.Tiles(width=64, stages=2, band=2)}
SHAPES = {"tpu": (45, 130, 140), "gpu": (212, 72, 68)}
HOPPER_SIZES = {
    "uneven": [3, 140, 1, 9, 59],
    "empty groups": [0, 70, 0, 142, 0],
    "one group": [0, 0, 212, 0, 0],
    "rows behind": [0, 70, 0, 77, 0],
    "nothing": [0, 0, 0, 0, 0],
}


def arrays(dtype, implementation="xla"):
    """x, both weights and the cotangent of the result."""
    rows, inputs, outputs = SHAPES.get(implementation, (45, 12, 20))
    rng = np.random.default_rng(0)
    weights = 5, inputs, outputs
    scaled = (((rows, inputs), 1.0), (weights, inputs**-0.5), (weights, inputs**-0.5), ((rows, outputs), 1.0))
    return tuple(jnp.asarray(scale * rng.normal(size=shape), dtype) for shape, scale in scaled)


def formula(x, gate, up, g, sizes):
    """The result and its gradients in float64."""
    x, gate, up, g = (np.asarray(a, np.float64) for a in (x, gate, up, g))
    out, d_x, d_gate, d_up = np.zeros_like(g), np.zeros_like(x), np.zeros_like(gate), np.zeros_like(up)
    for e, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[e], end)
        a, b = x[rows] @ gate[e], x[rows] @ up[e]
        sigmoid = 1 / (1 + np.exp(-a))
        out[rows] = a * sigmoid * b
        d_a, d_b = g[rows] * b * sigmoid * (1 + a * (1 - sigmoid)), g[rows] * a * sigmoid
        d_x[rows], d_gate[e], d_up[e] = d_a @ gate[e].T + d_b @ up[e].T, x[rows].T @ d_a, x[rows].T @ d_b
    return out, d_x, d_gate, d_up


@functools.cache
def compiled(implementation):
    """(x, gate, up, g, sizes) -> the result alone, the result under differentiation, and the gradients."""

    @jax.jit
    def run(x, gate, up, g, sizes):
        call = functools.partial(grouped_swiglu, group_sizes=sizes, implementation=implementation)
        out, pull = jax.vjp(call, x, gate, up)
        return call(x, gate, up), out, *pull(g)

    return lambda x, gate, up, g, sizes: run(x, gate, up, g, jnp.asarray(sizes, jnp.int32))


def run(implementation, *args):
    tiles = TILES.get(implementation)
    with devices.interpreter(implementation, devices.SMALL_GPU), trying("grouped_swiglu", implementation, tiles):
        with trying("grouped_matmul", implementation, tiles):
            return jax.block_until_ready(compiled(implementation)(*args))


def check(implementation, dtype, sizes):
    """Rows behind the last group, and the weights of groups without rows, are NaN."""
    x, gate, up, g = arrays(dtype, implementation)
    behind, absent = slice(sum(sizes), None), np.flatnonzero(np.array(sizes) == 0)
    hidden = [a.at[behind].set(jnp.nan) for a in (x, g)], [w.at[absent].set(jnp.nan) for w in (gate, up)]
    alone, *got = run(implementation, hidden[0][0], *hidden[1], hidden[0][1], sizes)
    _, *plain = run("reference", x, gate, up, g, sizes)
    exact = formula(x, gate, up, g, sizes)
    assert {a.dtype for a in (alone, *got)} == {jnp.dtype(dtype)}
    assert_numbers(NAMES, got, plain, exact, dtype)
    assert_numbers(["result alone"], [alone], plain[:1], exact[:1], dtype)


CASES = covering(
    {
        "sizes": ["uneven", "empty groups", "rows behind", "nothing"],
        "implementation": ["xla", "tpu"],
        "dtype": ["float32", "bfloat16", "float16"],
    },
    lambda case: not (case["implementation"] == "tpu" and case["dtype"] == "float16"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_results_and_gradients(case):
    check(case["implementation"], case["dtype"], SIZES[case["sizes"]])


@pytest.mark.parametrize("sizes", HOPPER_SIZES.values(), ids=HOPPER_SIZES)
def test_hopper(sizes):
    check("gpu", "bfloat16", sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", HOPPER_SIZES.values(), ids=HOPPER_SIZES)
def test_hopper_in_float16(sizes):
    check("gpu", "float16", sizes)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_groups_see_only_their_own_rows_and_weights(implementation):
    sizes = (HOPPER_SIZES if implementation == "gpu" else SIZES)["uneven"]
    x, gate, up, g = arrays("bfloat16", implementation)
    rows, group = slice(sum(sizes[:3]), sum(sizes[:4])), 3
    before = run(implementation, x, gate, up, g, sizes)
    changed = [w.at[group].set(jnp.nan) for w in (gate, up)]
    after = run(implementation, x.at[rows].set(jnp.nan), *changed, g.at[rows].multiply(1e4), sizes)
    for a, b in zip(before[:3], after[:3]):  # the result, alone and beside gradients, and the gradient of x
        np.testing.assert_array_equal(np.delete(a, np.r_[rows], 0), np.delete(b, np.r_[rows], 0))
    for a, b in zip(before[3:], after[3:]):
        np.testing.assert_array_equal(np.delete(a, group, 0), np.delete(b, group, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, gate, up, n: (x[0], gate, up, n), r"grouped_swiglu: x \(12,\) must be \[M, K\] and gate"),
        (lambda x, gate, up, n: (x, gate, up[:, :5], n), r"up \(5, 5, 20\) \[E, K, N\]"),
        (lambda x, gate, up, n: (x, gate, up[:, :, :5], n), r"gate and up must have one shape; got \(5, 12, 20\), \("),
        (lambda x, gate, up, n: (x, gate.astype("bfloat16"), up, n), "x and gate must share one dtype"),
        (lambda x, gate, up, n: (x, gate, up, n[:2]), r"grouped_swiglu: group_sizes must be integers \[5\]"),
    ],
)
def test_bad_calls_name_the_argument(change, message):
    x, gate, up, _ = arrays("float32")
    with pytest.raises(UserError, match=message):
        grouped_swiglu(*change(x, gate, up, jnp.asarray(SIZES["uneven"])))


@pytest.mark.parametrize("sizes", [[3, -1, 1, 9, 15], [3, 17, 1, 9, 16]], ids=["negative", "beyond the rows"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_group_sizes_that_are_not_there(implementation, sizes):
    """Named in debug mode, cut to the rows that are there out of it."""
    x, gate, up, g = arrays("float32")
    with debug.checking(), pytest.raises(UserError, match=r"grouped_swiglu: .* add up to 45 at most; got \[3, "):
        grouped_swiglu(x, gate, up, jnp.asarray(sizes), implementation=implementation)
    there = np.maximum(sizes, 0)
    there[-1] = min(there[-1], 45 - there[:-1].sum())
    _, *got = run(implementation, x, gate, up, g, sizes)
    for a, want in zip(got, formula(x, gate, up, g, there), strict=True):
        np.testing.assert_allclose(a, want, atol=1e-5)


def test_what_is_refused():
    x, gate, up, _ = arrays("float32")
    half = [a.astype("float16") for a in (x, gate, up)]
    sizes = jnp.zeros(5, jnp.int32)
    with devices.target(devices.GPU):
        assert "not float32" in explain(grouped_swiglu, x, gate, up, sizes).reasons["gpu"]
        assert explain(grouped_swiglu, *half, sizes).implementation == "gpu"
    with devices.target(devices.TPU):
        assert "float16" in explain(grouped_swiglu, *half, sizes).reasons["tpu"]
        assert explain(grouped_swiglu, x, gate, up, sizes).implementation == "tpu"
    with pytest.raises(UserError, match="written for TPUs, not for cpu"):
        grouped_swiglu(x, gate, up, sizes, implementation="tpu")


KERNELS = "grouped_swiglu", "grouped_swiglu_input_gradient", "grouped_matmul", "grouped_matmul_weight_gradient"


@pytest.mark.parametrize("device", [devices.TPU, devices.GPU], ids=["tpu", "gpu"])
def test_kernels_are_named(device):
    """One kernel where nothing is differentiated; else the two products, which the backward pass needs."""
    x, gate, up, _ = arrays("bfloat16")
    sizes = jnp.zeros(5, jnp.int32)

    def total(x, gate, up):
        return grouped_swiglu(x, gate, up, sizes).astype(jnp.float32).sum()

    with devices.target(device):
        alone, both = (str(jax.make_jaxpr(f)(x, gate, up)) for f in (total, jax.grad(total, (0, 1, 2))))
    count = lambda text: {name: len(re.findall(rf"llm_jax_{name}\b", text)) for name in KERNELS}  # noqa: E731
    assert [bool(n) for n in count(alone).values()] == [True, False, False, False]
    assert [bool(n) for n in count(both).values()] == [False, True, True, True]


@pytest.mark.parametrize("saves", [True, False])
def test_policies_choose_by_name(saves):
    """Saved are the two products, from which the backward pass makes the result again without a product."""
    x, gate, up, _ = arrays("float32")
    sizes = jnp.asarray(SIZES["uneven"], jnp.int32)
    names = [SAVED] if saves else []
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def total(x):
        return jax.checkpoint(lambda x: jnp.sin(grouped_swiglu(x, gate, up, sizes)), policy=policy)(x).sum()

    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(total, x)[1], x))
    assert sum(a.shape == (45, 20) for a in kept) == 2 * saves
