"""How far a kernel may be from a float64 formula."""

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
