"""A dense feed-forward layer made into a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from llm_jax.base.trees import flatten, unflatten


def upcycle(
    dense: Mapping[str, Any],
    num: int,
    key: Key[Array, ""],
    *,
    router_std: float = 0.02,
    noise: float = 0.0,
) -> dict[str, Any]:
    """Parameters of `Experts` with `num` experts, each a copy of the layer: Komatsuzaki et al. 2022 (arXiv:2212.05055).

    With weights that add up to 1 (`normalize`, `scale=1`), nothing dropped and no noise, the new layer computes what
    the dense one did, whatever its router says.

    Args:
        dense: parameters of a `FeedForward`, `gate`, `up`, `down` with `weight` [*layers, inputs, outputs] and `bias`.
        key: of the router's and the noise's numbers.
        router_std: standard deviation of the router's initial weights.
        noise: to each expert's weights normal numbers are added, of `noise` times the standard deviation of the dense
            weight they are a copy of (of its layer, where layers are stacked); biases stay.

    Returns:
        `{"router": {"weight": [*layers, D, E]}, ...}` and each part of `dense` with an axis of experts before its own.
    """
    flat, out = flatten(dense), {}
    for i, path in enumerate(sorted(flat)):
        value, own = flat[path], 2 if path.endswith("weight") else 1
        copies = jnp.repeat(jnp.expand_dims(value, -1 - own), num, -1 - own)
        if noise and own == 2:
            size = noise * jnp.std(value, (-2, -1), keepdims=True)[..., None, :, :]
            copies += size * jax.random.normal(jax.random.fold_in(key, i + 1), copies.shape, copies.dtype)
        out[path] = copies
    *layers, width, _ = flat["up/weight"].shape
    router = router_std * jax.random.normal(jax.random.fold_in(key, 0), (*layers, width, num), jnp.float32)
    return unflatten({**out, "router/weight": router})
