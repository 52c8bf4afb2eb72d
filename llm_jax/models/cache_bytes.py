"""What decoding keeps of the past, in bytes: of the very caches that it allocates, by their shapes."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from llm_jax.models.cache import init_caches
from llm_jax.models.config import ModelConfig
from llm_jax.models.segments import layer_specs
from llm_jax.models.state_cache import StateCache


@dataclass(frozen=True)
class CacheBytes:
    """Of one sequence. An encoder keeps nothing."""

    per_token: int
    """A token more takes this, as long as every window has room."""
    window: int | None
    """Tokens of the sliding layers' window; None where no layer slides."""
    per_token_beyond: int
    """A token more takes this past the window: in the layers that see everything."""
    state: int
    """What layers with states take at any length."""


def cache_bytes(config: ModelConfig, dtype: str) -> CacheBytes:
    """How the caches of `init_caches` grow."""
    config = config.resolved()
    if not config.causal:
        return CacheBytes(0, None, 0, 0)
    slides = any(spec.mixer == "attention" and spec.sees == "sliding" for spec in layer_specs(config))
    window = config.window if slides else None

    def step(length: int) -> int:
        return total_bytes(config, 1, length + 1, dtype) - total_bytes(config, 1, length, dtype)

    caches = jax.eval_shape(lambda: init_caches(config, 1, 1, dtype))
    state = _bytes([cache for cache in caches if isinstance(cache, StateCache)])
    return CacheBytes(step(1) if window is None or window > 1 else step(0), window, step(window or 1), state)


def total_bytes(config: ModelConfig, batch: int, length: int, dtype: str) -> int:
    """Of `batch` sequences of `length` tokens."""
    if not config.causal:
        return 0
    return _bytes(jax.eval_shape(lambda: init_caches(config, batch, length, dtype)))


def _bytes(caches: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
