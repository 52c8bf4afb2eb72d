"""Parameters and gradients of the steps that tests/golden/optimizers.json records. NumPy only."""

from collections.abc import Callable

import numpy as np

LAYERS, STEPS, LR = 2, 3, 0.02
SHAPES = {"wide": (4, 6), "tall": (6, 3), "vector": (5,)}
"""In torch's layout: a matrix is [out, in]."""


def initial(draw: Callable[..., np.ndarray], name: str, layer: int) -> np.ndarray:
    """float32; layers of very different size, so that a norm over several of them would be another."""
    return draw(f"optimizers.{layer}.{name}", SHAPES[name], 0) * np.float32(10.0**layer)


def gradient(draw: Callable[..., np.ndarray], name: str, layer: int, step: int) -> np.ndarray:
    """float32, likewise."""
    return draw(f"optimizers.{layer}.{name}.grad{step}", SHAPES[name], 0) * np.float32(0.01**layer)
