"""Cases and candidates for the sizes of the loss's chunks and tiles."""

from collections.abc import Mapping

import jax

from llm_jax.kernels.cases import Case, normal, size
from llm_jax.kernels.linear_cross_entropy import linear_cross_entropy

SHAPE = {"tokens": 4096, "width": 4096, "vocab": 128256}
CANDIDATES = {
    "gpu": ({"width": (128, 192, 256), "stages": (3, 4), "band": (4, 8, 16, 32), "chunk": (1024, 2048, 4096)},),
    "tpu": ({"tokens": (128, 256, 512, 1024), "vocab": (128, 256, 512, 1024)},),
    "xla": ({"logits_mib": (1, 4, 16, 64, 256, 1024), "tokens": (64, 128, 256, 512, 1024, 2048)},),
}


def make_case(shape: Mapping[str, int], dtype: str) -> Case:
    """Log-probabilities; backward flops are those of the two gradients, without the logits made again."""
    M, D, V = shape["tokens"], shape["width"], shape["vocab"]
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = normal(keys[0], (M, D), dtype), normal(keys[1], (D, V), dtype, D**-0.5)
    targets = jax.random.randint(keys[2], (M,), 0, V)

    def call(hidden, head, targets, implementation):
        return linear_cross_entropy(hidden, head, targets, implementation=implementation)["logps"]

    flops = 2.0 * M * D * V
    return Case((hidden, head, targets), call, (0, 1), flops, 2 * flops, size(hidden, head, targets) + 4 * M)
