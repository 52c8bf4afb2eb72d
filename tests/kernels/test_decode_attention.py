"""decode_attention: both implementations against numpy in float64, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import decode_attention, flash_attention
from tests.kernels.numerics import assert_numbers

RNG = np.random.default_rng(0)
B, N, K, S, H = 3, 6, 2, 17, 8
LENGTHS = np.asarray([1, 9, 17], np.int32)


def arrays(dtype="float32"):
    shapes = ((B, N, H), (B, K, S, H), (B, K, S, H + 4))
    return tuple(jnp.asarray(RNG.normal(size=shape), dtype) for shape in shapes)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equals_the_formula(dtype, implementation):
    q, k, v = arrays(dtype)
    got, plain = (
        decode_attention(q, k, v, jnp.asarray(LENGTHS), scale=0.3, implementation=name)
        for name in (implementation, "reference")
    )
    assert got.dtype == dtype
    want = np.zeros((B, N, H + 4))
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, length in enumerate(LENGTHS):
        for n in range(N):
            head = n // (N // K)
            scores = 0.3 * k64[b, head, :length] @ q64[b, n]
            weights = np.exp(scores - scores.max())
            want[b, n] = weights @ v64[b, head, :length] / weights.sum()
    assert_numbers(["out"], [got], [plain], [want], dtype, limit=1e-6)


def test_equals_flash_attention_of_one_query():
    q, k, v = arrays()
    ranges = jnp.stack([jnp.zeros(B, jnp.int32), jnp.asarray(LENGTHS)], 1)
    k_SK, v_SK = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    want = flash_attention(q[:, None], k_SK, v_SK, causal=False, kv_ranges=ranges)[:, 0]
    np.testing.assert_allclose(decode_attention(q, k, v, jnp.asarray(LENGTHS)), want, atol=2e-6)


def test_slots_that_are_not_seen_may_hold_anything_finite():
    q, k, v = arrays()
    far = np.arange(S)[None, None, :, None] >= LENGTHS[:, None, None, None]
    other = decode_attention(q, jnp.where(far, 1e30, k), jnp.where(far, -1e30, v), jnp.asarray(LENGTHS))
    np.testing.assert_array_equal(other, decode_attention(q, k, v, jnp.asarray(LENGTHS)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q[0], k, v, n), r"q must be \[B, N, H\]"),
        (lambda q, k, v, n: (q, k[:, :, :, :4], v, n), r"k \(3, 2, 17, 4\) must be"),
        (lambda q, k, v, n: (q, k, v[:, :, :9], n), "v .* must agree with k"),
        (lambda q, k, v, n: (q[:, :5], k, v, n), "do not divide the 5 heads"),
        (lambda q, k, v, n: (q.astype("bfloat16"), k, v, n), "must share one dtype"),
        (lambda q, k, v, n: (q, k, v, n[:2]), "lengths must be integers"),
        (lambda q, k, v, n: (q, k, v, n * 1.0), "lengths must be integers"),
    ],
)
def test_bad_calls_name_the_argument(change, message):
    with pytest.raises(UserError, match=message):
        decode_attention(*change(*arrays(), jnp.asarray(LENGTHS)))
