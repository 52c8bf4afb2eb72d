"""causal_conv1d: `xla` and `reference` against float64 and NumPy; documents, states, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import kernels
from llm_jax.base.errors import UserError
from tests.kernels.numerics import assert_numbers
from tests.kernels.recurrences import RAGGED, documents, normal, value_and_grads, with_grads

B, T, D = 2, 45, 5
NAMES = ("y", "final", "d_x", "d_weight", "d_bias", "d_initial")


def make(width=4, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, D), (width, D), (D,), (B, width - 1, D)
    return [normal(rng, *shape, dtype=dtype) for shape in shapes]


def exact(arrays, segment_ids):
    """What `value_and_grads` makes of these values with "silu", document by document in float64."""
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(np.asarray(x, np.float64)) for x in arrays)

        def convolve(arrays):
            x, weight, bias, before = arrays
            y, final = jnp.zeros_like(x), before
            for row, place in documents(segment_ids):
                inputs = jnp.concatenate([before[row], x[row, place]])
                size = place.stop - place.start
                z = sum(inputs[i : i + size] * tap for i, tap in enumerate(weight)) + bias
                y, final = y.at[row, place].set(jax.nn.silu(z)), final.at[row].set(inputs[size:])
                before = before.at[row].set(0.0)
            return y, final

        return jax.tree.map(np.asarray, jax.jit(lambda wide: with_grads(convolve, wide, arrays[0].dtype))(wide))


@pytest.mark.parametrize(
    "width, packed, dtype",
    [(1, True, "float32"), (2, False, "float32"), (4, True, "float32"), (4, True, "bfloat16"), (4, False, "float16")],
)
def test_equals_the_formula(width, packed, dtype):
    arrays = make(width, dtype)
    options = {"activation": "silu"} | ({"segment_ids": jnp.asarray(RAGGED)} if packed else {})
    got, plain = (value_and_grads(kernels.causal_conv1d, arrays, name, **options) for name in ("xla", "reference"))
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    want = exact(arrays, RAGGED if packed else np.ones((B, T), int))
    assert_numbers(NAMES, got, plain, want, dtype, limit=2e-6)


def test_equals_numpy():
    x, weight, bias, _ = make()
    want = np.stack([[np.convolve(x[b, :, d], weight[::-1, d])[:T] for d in range(D)] for b in range(B)])
    np.testing.assert_allclose(kernels.causal_conv1d(x, weight, bias), want.swapaxes(1, 2) + bias, atol=2e-6)


def test_packed_equals_each_document_alone():
    x, weight, bias, state = make()
    options = {"activation": "silu", "return_final_state": True}
    y, final = kernels.causal_conv1d(x, weight, bias, segment_ids=jnp.asarray(RAGGED), initial_state=state, **options)
    seen = set()
    for row, place in documents(RAGGED):
        before = None if row in seen else state[row : row + 1]
        want, end = kernels.causal_conv1d(x[row : row + 1, place], weight, bias, initial_state=before, **options)
        np.testing.assert_allclose(y[row, place], want[0], rtol=1e-6, atol=1e-6)
        if place.stop == np.flatnonzero(RAGGED[row])[-1] + 1:
            np.testing.assert_array_equal(final[row], end[0])
        seen.add(row)
    assert not np.asarray(y)[np.asarray(RAGGED) == 0].any()


def test_documents_do_not_touch_each_other():
    x, weight, bias, _ = make()
    segments = jnp.asarray(RAGGED)
    wild = jnp.where((segments == 2)[..., None], jnp.nan, x)
    y, other = (kernels.causal_conv1d(a, weight, bias, segment_ids=segments) for a in (x, wild))
    np.testing.assert_array_equal(np.isnan(other), np.broadcast_to(np.asarray(segments == 2)[..., None], y.shape))
    np.testing.assert_array_equal(other[segments != 2], y[segments != 2])


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]])
def test_a_row_in_pieces(sizes):
    """Short pieces whose state reaches back beyond the piece; ragged ones with padding on either side."""
    x, weight, bias, state = make()
    want, end = kernels.causal_conv1d(x[:, :6], weight, bias, initial_state=state, return_final_state=True)
    for left in (0, 3):
        parts, held, done = [], state, 0
        for size in sizes:
            piece = jnp.pad(x[:, done : done + size], ((0, 0), (left, 3 - left), (0, 0)), constant_values=jnp.nan)
            ids = jnp.pad(jnp.ones((B, size), jnp.int32), ((0, 0), (left, 3 - left)))
            y, held = kernels.causal_conv1d(
                piece, weight, bias, segment_ids=ids, initial_state=held, return_final_state=True
            )
            parts.append(y[:, left : left + size])
            done += size
        np.testing.assert_allclose(jnp.concatenate(parts, 1), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(held, end)


def test_a_row_of_padding_leaves_the_state():
    x, weight, bias, state = make()
    options = {"segment_ids": jnp.zeros((B, T), jnp.int32), "return_final_state": True}
    y, final = kernels.causal_conv1d(x, weight, bias, initial_state=state, **options)
    np.testing.assert_array_equal(final, state)
    assert not np.asarray(y).any()
    assert not np.asarray(kernels.causal_conv1d(x, weight, **options)[1]).any()


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(weight=jnp.ones((4, D + 1))), "weight"),
        (dict(bias=jnp.ones(3)), "bias"),
        (dict(activation="relu"), "activation"),
        (dict(initial_state=jnp.ones((B, 4, D))), "initial_state"),
        (dict(segment_ids=jnp.ones((B, T))), "segment_ids"),
        (dict(x=jnp.ones((B, T, D), jnp.int32)), "x must"),
        (dict(implementation="cuda"), "cuda"),
    ],
)
def test_bad_calls_name_the_argument(change, word):
    x, weight, bias, _ = make()
    with pytest.raises(UserError, match=word):
        kernels.causal_conv1d(**dict(x=x, weight=weight, bias=bias) | change)


def test_explain_and_jit():
    x, weight, bias, _ = make()
    assert str(kernels.explain("causal_conv1d", x, weight, bias)).startswith("causal_conv1d: xla")
    np.testing.assert_allclose(
        jax.jit(kernels.causal_conv1d)(x, weight, bias), kernels.causal_conv1d(x, weight, bias), atol=1e-6
    )
