"""Weights from a seed, the same in the oracle scripts and in the tests, so that golden files hold results only.

numpy alone. Values are uniform and drawn by `RandomState`, whose stream is frozen (NEP 19) and whose `random_sample`
uses no libm: every numpy on every machine draws the same bits.
"""

import hashlib

import numpy as np


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 values for the tensor called `name`, Hugging Face's name and layout (`[out, in]`, embedding `[V, D]`).

    They depend on `(seed, name, shape)` only, not on the order of drawing. Norm weights lie in 1 ± 0.2, biases in ± 0.2
    (nothing starts at a special value), matrices have variance 1 / columns, the embedding variance 1.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    random = np.random.RandomState(np.frombuffer(digest, np.uint32))
    unit = 2.0 * random.random_sample(shape) - 1.0
    if len(shape) == 1:
        values = 0.2 * unit + ("norm" in name and name.endswith("weight"))
    elif "embed" in name:
        values = np.sqrt(3.0) * unit
    else:
        values = np.sqrt(3.0 / shape[-1]) * unit
    return values.astype(np.float32)


def draw_tokens(name: str, shape: tuple[int, ...], vocab_size: int, seed: int) -> np.ndarray:
    """int32 token ids in [0, vocab_size), as a function of `(seed, name, shape)`."""
    digest = hashlib.sha256(f"{seed}:{name}:tokens".encode()).digest()
    random = np.random.RandomState(np.frombuffer(digest, np.uint32))
    return np.floor(random.random_sample(shape) * vocab_size).astype(np.int32)


def project(name: str, values: np.ndarray, count: int = 16) -> np.ndarray:
    """float64[count]: a tensor's inner products with `count` arrays of random signs, the same for every call.

    Their mean square is, in expectation, the tensor's squared norm: of two tensors the projections' difference tells
    the norm of the difference, in a few numbers instead of all.
    """
    digest = hashlib.sha256(f"{name}:signs".encode()).digest()
    random = np.random.RandomState(np.frombuffer(digest, np.uint32))
    signs = np.where(random.random_sample((count, values.size)) < 0.5, -1.0, 1.0)
    return signs @ np.asarray(values, np.float64).ravel()
