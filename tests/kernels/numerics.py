"""How far a kernel may be from a float64 formula."""

import jax.numpy as jnp
import numpy as np


def distance(got, exact) -> float:
    """norm(got - exact) / norm(exact), in float64; values that are infinite must be equal and do not count."""
    got, exact = (np.asarray(x, np.float64) for x in (got, exact))
    assert got.shape == exact.shape
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[~finite], exact[~finite])
    norm = np.linalg.norm(exact[finite])
    return float(np.linalg.norm(got[finite] - exact[finite]) / (norm if norm > 0 else 1.0))


def assert_float32(name: str, got, exact, limit: float = 1e-5) -> None:
    """float32 kernels: 1e-5 of the formula."""
    assert distance(got, exact) <= limit, f"{name}: {distance(got, exact):.2e} > {limit:.0e}"


def assert_half(name: str, got, reference, exact) -> None:
    """bfloat16 and float16 kernels: at most twice the error of the plain form computed in the same dtype."""
    limit = 2 * distance(reference, exact)
    assert distance(got, exact) <= limit, f"{name}: {distance(got, exact):.2e} > 2 x {limit / 2:.2e} of the reference"


def assert_narrow(name: str, got, exact, terms, dtype) -> None:
    """float32 sums of products with factors in `dtype`, where the plain form rounds nothing: at most twice the error
    that rounding the terms (of a sum over all tokens; else the exact numbers themselves) to `dtype` makes.

    In the mean square, as of many numbers: what becomes of two or three is a matter of chance.
    """
    info, terms = jnp.finfo(dtype), np.asarray(terms, np.float64)
    step = np.maximum(float(info.eps) * 2.0 ** (np.frexp(terms)[1] - 1), float(info.smallest_subnormal))
    limit = 2 * np.linalg.norm(step[terms != 0]) / 12**0.5 / np.linalg.norm(np.asarray(exact, np.float64))
    assert distance(got, exact) <= limit, f"{name}: {distance(got, exact):.2e} > 2 x {limit / 2:.2e} of rounding"


def assert_numbers(names, got, plain, exact, dtype, narrow=None, limit: float = 1e-5) -> None:
    """Results of a call in `dtype`, beside those of the reference and the formula: float32 ones, the reference's too,
    within `limit`; others by `assert_half`. Unless `dtype` is float32, `narrow` names those for `assert_narrow`, with
    their terms."""
    narrow = narrow if narrow and dtype != "float32" else {}
    for name, one, reference, want in zip(names, got, plain, exact, strict=True):
        assert one.dtype == reference.dtype, name
        if one.dtype != jnp.float32:
            assert_half(name, one, reference, want)
            continue
        assert_float32(f"{name} of the reference", reference, want, limit)
        if name in narrow:
            assert_narrow(name, one, want, narrow[name], dtype)
        else:
            assert_float32(name, one, want, limit)
