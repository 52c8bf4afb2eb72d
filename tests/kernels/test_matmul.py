"""matmul: arrays and quantized weights against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import QuantizedArray, matmul, quantize
from llm_jax.kernels.matmul import dequantize
from tests.kernels.numerics import assert_numbers


def make(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 512)), dtype)
    return x, jnp.asarray(rng.normal(size=(512, 24)), dtype)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_and_gradients(dtype, implementation):
    x, w = make(dtype)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 24)), dtype)

    def run(implementation):
        out, pull = jax.vjp(lambda x, w: matmul(x, w, implementation=implementation), x, w)
        return out, *pull(g)

    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    want = x64 @ w64, g64 @ w64.T, np.einsum("abk,abm->km", x64, g64)
    got = run(implementation)
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
    assert_numbers(("product", "d_x", "d_w"), got, run("reference"), want, dtype, limit=1e-6)


def test_int8_is_off_by_half_a_scale_at_most():
    _, w = make("float32")
    q = quantize(w)
    assert q.codes.dtype == jnp.int8 and q.scales.shape == (1, 24) and q.shape == w.shape
    assert np.all(np.abs(dequantize(q) - w) <= 0.5001 * np.asarray(q.scales))
    np.testing.assert_allclose(np.abs(np.asarray(q.codes)).max(0), 127)
    np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((4, 3)))), np.zeros((4, 3)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantized_products(dtype):
    x, w = make(dtype)
    q = quantize(w)
    weight = np.asarray(q.codes, np.float64) * np.asarray(q.scales, np.float64)

    def run(implementation):
        def total(x, q):
            out = matmul(x, q, implementation=implementation)
            return out.astype(jnp.float32).sum(), out

        (_, out), (dx, dq) = jax.value_and_grad(total, (0, 1), has_aux=True, allow_int=True)(x, q)
        assert not np.asarray(dq.scales).any()
        return out, dx

    want = np.asarray(x, np.float64) @ weight, np.broadcast_to(weight.sum(1), x.shape)
    assert_numbers(("product", "d_x"), run("xla"), run("reference"), want, dtype, limit=1e-6)


def test_a_quantized_stack_is_scanned():
    x, w = make("float32")
    w = w[:, :24].reshape(2, 256, 24)
    q = quantize(w)
    assert isinstance(q, QuantizedArray) and q.scales.shape == (2, 1, 24)
    _, outs = jax.lax.scan(lambda c, layer: (c, matmul(x[..., :256], layer)), None, q)
    for i in range(2):
        want = np.asarray(x[..., :256]) @ np.asarray(dequantize(q)[i])
        np.testing.assert_allclose(outs[i], want, rtol=1e-4, atol=1e-4)


def test_bad_calls_name_the_argument():
    x, w = make("float32")
    for bad, word in (
        (lambda: matmul(x, w[:5]), "w "),
        (lambda: matmul(x.astype(jnp.int32), w), "x "),
        (lambda: matmul(x, w.astype(jnp.int8)), "QuantizedArray"),
        (lambda: matmul(x, w, implementation="tpu"), "tpu"),
        (lambda: quantize(w, "int3"), "int3"),
        (lambda: matmul(x, QuantizedArray(w.astype(jnp.int8), w[:1], "nf5")), "nf5"),
    ):
        with pytest.raises(UserError, match=word):
            bad()
