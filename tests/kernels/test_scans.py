"""selective_scan and ssd: against the recurrence in float64; documents, states, decays, closed forms, memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import kernels
from llm_jax.base.errors import UserError
from tests.kernels import scan_cases
from tests.kernels.numerics import assert_numbers
from tests.kernels.recurrences import (
    NAMES,
    RAGGED,
    documents,
    error,
    errors,
    exact,
    make_scan,
    value_and_grads,
)

BATCH, LENGTH = 2, 45
OPS = {"selective_scan": kernels.selective_scan, "ssd": kernels.ssd}


make = partial(make_scan, batch=BATCH, length=LENGTH)


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@cache
def formula(op, dtype, packed):
    """What `value_and_grads` makes of `make`, by the recurrence in float64."""
    return exact(op, make(op, dtype), RAGGED if packed else None)


@pytest.mark.parametrize("implementation, chunk_size", [("reference", None), *(("xla", n) for n in (None, 1, 7, 16))])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_formula(op, implementation, chunk_size, packed):
    options = {"segment_ids": jnp.asarray(RAGGED)} if packed else {}
    got = value_and_grads(OPS[op], make(op), implementation, chunk_size=chunk_size, **options)
    assert max(errors(got, formula(op, "float32", packed).numbers)) < 2e-6


@pytest.mark.parametrize("steepness", [30.0, 1e4])
def test_steep_decays(op, steepness):
    """dt A down to -1e5 beside steps of nothing at all: no overflow, and small gradients are not lost in sums."""
    arrays = make(op, steepness=steepness)
    options = {"segment_ids": jnp.asarray(RAGGED)}
    got = value_and_grads(OPS[op], arrays, "xla", **options)
    assert max(errors(got, value_and_grads(OPS[op], arrays, "reference", **options))) < 2e-6


def test_packed_equals_each_document_alone(op):
    """The first document of a row goes on from the row's state; others begin anew; the last one's state is left."""
    *arrays, state = make(op)
    run = jax.jit(partial(OPS[op], return_final_state=True, chunk_size=16))
    y, final = run(*arrays, segment_ids=jnp.asarray(RAGGED), initial_state=state)
    seen = np.zeros(BATCH, bool)
    covered = np.zeros((BATCH, LENGTH), bool)
    for row, place in documents(RAGGED):
        alone = [x[row : row + 1, place] if x.ndim > 2 else x for x in arrays]
        before = None if seen[row] else state[row : row + 1]
        want, end = run(*alone, initial_state=before)
        np.testing.assert_allclose(y[row, place], want[0], rtol=1e-5, atol=1e-5)
        seen[row], covered[row, place] = True, True
        last = end[0]
        if place.stop == np.flatnonzero(np.asarray(RAGGED[row]))[-1] + 1:
            np.testing.assert_allclose(final[row], last, rtol=1e-5, atol=1e-5)
    assert not np.asarray(y)[~covered].any()


def test_documents_do_not_touch_each_other(op):
    """Bit for bit, gradients too, even where the other document overflows."""
    *arrays, state = make(op)
    segments = jnp.asarray(RAGGED)
    other = segments == 2

    def run(first):
        def loss(first):
            y = OPS[op](first, *arrays[1:], segment_ids=segments, chunk_size=16)
            kept = jnp.where(other.reshape(other.shape + (1,) * (y.ndim - 2)), 0.0, y)
            return jnp.sum(jnp.sin(kept)), kept

        (_, y), g = jax.value_and_grad(loss, has_aux=True)(first)
        return y, g

    wild = jnp.where(other.reshape(other.shape + (1,) * (arrays[0].ndim - 2)), 1e30, arrays[0])
    for a, b in zip(run(arrays[0]), run(wild)):
        np.testing.assert_array_equal(a, b)


def test_a_document_too_large_for_float16(op):
    """It becomes infinite, in its own tokens only; document 2 goes on over the edge of a chunk."""
    sizes = {"heads": (4, 64), "groups": 2} if op == "ssd" else {"channels": 5}
    case = scan_cases.Case(op, "float16", True, True, sizes, length=140)
    run = scan_cases.program(case, "xla", None)
    scan_cases.check_documents(case, run, run(*scan_cases.arguments(case)))


def test_a_row_in_pieces(op):
    """Pieces of 1, 20 and 24 tokens, each from the state of the one before, are the whole."""
    *arrays, state = make(op)
    run = jax.jit(partial(OPS[op], return_final_state=True, chunk_size=8))
    want, end = run(*arrays, initial_state=state)
    parts = []
    for place in (slice(0, 1), slice(1, 21), slice(21, 45)):
        piece = [x[:, place] if x.ndim > 2 else x for x in arrays]
        y, state = run(*piece, initial_state=state)
        parts.append(y)
    assert error(jnp.concatenate(parts, 1), want) < 1e-6 and error(state, end) < 1e-6


def test_a_single_token(op):
    """A step of decoding is a form of its own; its row of padding leaves the state as it is."""
    arrays, options = make(op, length=1), {"segment_ids": jnp.asarray([[1], [0]])}
    got = value_and_grads(OPS[op], arrays, "xla", **options)
    assert max(errors(got, value_and_grads(OPS[op], arrays, "reference", **options))) < 1e-6
    np.testing.assert_array_equal(got[1][1], arrays[-1][1])


def test_a_row_of_padding_leaves_the_state(op):
    *arrays, state = make(op)
    arrays[0] = arrays[0].at[1].set(jnp.nan)
    segments = jnp.ones((BATCH, LENGTH), jnp.int32).at[1].set(0)
    y, final = OPS[op](*arrays, segment_ids=segments, initial_state=state, return_final_state=True)
    np.testing.assert_array_equal(final[1], state[1])
    assert not np.asarray(y[1]).any() and np.isfinite(final[0]).all()


def test_closed_form(op):
    """Constant input 1, dt = 0.5, A = -1, B = C = 1: y[t] = 0.5 (1 - e^(-(t+1)/2)) / (1 - e^(-1/2)), N times."""
    arrays = [jnp.ones_like(x) for x in make(op)[:5]]
    arrays[1], arrays[2] = 0.5 * arrays[1], -arrays[2]
    y = OPS[op](*arrays, chunk_size=16)
    t = np.arange(LENGTH)
    want = 6 * 0.5 * (1 - np.exp(-(t + 1) / 2)) / (1 - np.exp(-0.5))
    np.testing.assert_allclose(y, np.broadcast_to(want.reshape(1, -1, *(1,) * (y.ndim - 2)), y.shape), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(op, dtype):
    """States and sums are float32."""
    options = {"segment_ids": jnp.asarray(RAGGED)}
    got, plain = (value_and_grads(OPS[op], make(op, dtype), name, **options) for name in ("xla", "reference"))
    want = formula(op, dtype, True)
    assert_numbers(NAMES, got, plain, want.numbers, dtype, want.narrow)


def test_ssd_equals_selective_scan():
    """Mamba-2 with one head per channel is Mamba with A the same for all n."""
    x, dt, rates, b, c, skip, _ = make("ssd")
    x = x[..., :1]
    got = kernels.ssd(x, dt, rates, b[:, :, :1], c[:, :, :1], skip)
    wide = jnp.broadcast_to(rates[:, None], (4, 6))
    want = kernels.selective_scan(x[..., 0], dt, wide, b[:, :, 0], c[:, :, 0], skip)
    assert error(got[..., 0], want) < 1e-6


def test_memory_holds_no_states_of_tokens(op):
    """Temporaries of a backward pass are a small part of the states of all tokens."""
    length, channels, states = 4096, 64, 32
    shapes = {
        "selective_scan": [(1, length, channels)] * 2 + [(channels, states)] + [(1, length, states)] * 2,
        "ssd": [(1, length, 4, 16), (1, length, 4), (4,), *[(1, length, 1, states)] * 2],
    }[op]
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    grad = jax.grad(lambda *arrays: OPS[op](*arrays).sum(), range(5))
    memory = jax.jit(grad).lower(*structs).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 4 * length * channels * states / 3


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(op, check_vma):
    """Rows over 8 devices, rates on all of them: their gradient is the sum."""
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    *arrays, _ = make(op, batch=8, length=12)
    specs = tuple(P("data") if x.ndim > 2 else P() for x in arrays)
    f = lambda *arrays: OPS[op](*arrays, chunk_size=5)  # noqa: E731
    sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)
    grads = lambda f: jax.jit(jax.grad(lambda *arrays: jnp.sin(f(*arrays)).sum(), range(6)))(*arrays)  # noqa: E731
    assert max(errors(grads(sharded), grads(f))) < 2e-6


@pytest.mark.parametrize(
    "index, shape, word",
    [
        (1, (2, 45, 3), "dt|delta"),
        (2, (9,), "A"),
        (3, (2, 45, 7), "B"),
        (5, (9,), "skip"),
        (6, (2, 3), "initial_state"),
    ],
)
def test_bad_calls_name_the_argument(op, index, shape, word):
    arrays = list(make(op))
    arrays[index] = jnp.ones(shape)
    with pytest.raises(UserError, match=word):
        OPS[op](*arrays[:6], initial_state=arrays[6])
    with pytest.raises(UserError, match="chunk_size"):
        OPS[op](*make(op)[:6], chunk_size=0)
    with pytest.raises(UserError, match="segment_ids"):
        OPS[op](*make(op)[:6], segment_ids=jnp.ones((2, 45)))
    assert str(kernels.explain(OPS[op], *make(op)[:6])).startswith(f"{op}: xla")
