"""Initial values. Each depends on the seed and on the parameter's path with its layer number, and on nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cache
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.sharding.placement import place


def init_params(decoder: Decoder, seed: int, shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """float32 parameters of an abstract decoder, made where `shardings` puts them.

    Equal, bit for bit, under every grouping of layers, on every mesh and on every kind of device: layer 3's query
    weight draws from `fold_in(fold_in(key(seed), name), 3)`, Threefry numbers each element of an array by its index,
    and `_draw` has no step that compilers round differently.
    """
    shapes, declared = flatten(abstract_params(decoder)), flatten(declarations(decoder))
    where = dict.fromkeys(shapes) if shardings is None else flatten(shardings)
    key, table = jax.random.key(seed), jnp.asarray(_quantiles())

    def value(path: str) -> Array:
        shape, init = shapes[path].shape, declared[path].init
        if init.kind != "normal":
            return place(np.full(shape, 1.0 if init.kind == "ones" else 0.0, np.float32), where[path])
        name, layers = path, None
        if path.startswith("segments/"):
            _, segment, position, inner = path.split("/", 3)
            name, shape = f"layers/*/{inner}", shape[1:]
            layers = np.array(decoder.groups[int(segment)].layers(int(position)))
        # Parameters of one shape and place share a program: compiling Threefry takes longer than running it.
        draw = jax.jit(_draw, static_argnames="shape", out_shardings=where[path])
        return draw(
            key, np.uint32(zlib.crc32(name.encode())), layers, table, np.float32(init.std / 2**0.5), shape=shape
        )

    return unflatten({path: value(path) for path in shapes})


def _draw(
    key: Array, name: Array, layers: Array | None, table: Array, scale: Array, *, shape: tuple[int, ...]
) -> Float[Array, "*shape"]:
    """Normal numbers of standard deviation `sqrt(2) * scale`: `shape`, or `[layers, *shape]`.

    By table, with one rounding in a sum and one in a product. `jax.random.normal` differs in the last bit between
    meshes: its erf_inv is rounded by how XLA cuts a loop into vectors (seen on a CPU: 4% of the elements of a weight).
    The sum of two draws of 65536 equally likely quantiles has a normal's moments to 1e-4 and reaches 6 sigma.
    """
    key = jax.random.fold_in(key, name)

    def normal(key: Array) -> Array:
        bits = jax.random.bits(key, shape, jnp.uint32)
        return (table[bits >> 16] + table[bits & 0xFFFF]) * scale

    if layers is None:
        return normal(key)
    return jax.vmap(lambda layer: normal(jax.random.fold_in(key, layer)))(layers)


@cache
def _quantiles() -> np.ndarray:
    """float32[65536]: midpoint quantiles of the standard normal, scaled to variance 1."""
    upper = np.array([NormalDist().inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)])
    upper /= np.sqrt(np.mean(upper**2))
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)
