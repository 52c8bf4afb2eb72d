"""Initial values. Each depends on the seed and on the parameter's path with its layer number, and on nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
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


def init_params(
    decoder: Decoder,
    seed: int,
    shardings: Mapping[str, Any] | None = None,
    wanted: Callable[[str], bool] = lambda path: True,
) -> dict[str, Any]:
    """float32 parameters of an abstract decoder, made where `shardings` puts them: those whose path is `wanted`.

    Equal, bit for bit, under every grouping of layers, on every mesh and on every kind of device: layer 3's query
    weight draws from `fold_in(fold_in(key(seed), name), 3)`, Threefry numbers each element of an array by its index,
    and `_draw` has no step that compilers round differently.
    """
    shapes, declared = flatten(abstract_params(decoder)), flatten(declarations(decoder))
    where = dict.fromkeys(shapes) if shardings is None else flatten(shardings)
    key, normal = jax.random.key(seed), jnp.asarray(_quantiles())

    def value(path: str) -> Array:
        shape, init = shapes[path].shape, declared[path].init
        if init.kind == "log_arange":
            rates = np.log(np.arange(1, shape[-1] + 1)).astype(np.float32)
            return place(np.array(np.broadcast_to(rates, shape)), where[path])
        if init.kind in ("zeros", "ones"):
            return place(np.full(shape, 1.0 if init.kind == "ones" else 0.0, np.float32), where[path])
        name, layers = path, None
        if path.startswith("segments/"):
            _, segment, position, inner = path.split("/", 3)
            name, shape = f"layers/*/{inner}", shape[1:]
            layers = np.array(decoder.groups[int(segment)].layers(int(position)))
        # Parameters of one shape and place share a program: compiling Threefry takes longer than running it.
        draw = jax.jit(_draw, static_argnames="shape", out_shardings=where[path])
        tables, scale = (normal, normal), init.std / 2**0.5
        if init.steps is not None:
            tables, scale = (jnp.asarray(_step_biases(*init.steps)), jnp.zeros_like(normal)), 1.0
        return draw(key, np.uint32(zlib.crc32(name.encode())), layers, *tables, np.float32(scale), shape=shape)

    return unflatten({path: value(path) for path in shapes if wanted(path)})


def _draw(
    key: Array, name: Array, layers: Array | None, first: Array, second: Array, scale: Array, *, shape: tuple[int, ...]
) -> Float[Array, "*shape"]:
    """`scale` times the sum of a number of either table, drawn for each element: `shape`, or `[layers, *shape]`.

    Normal numbers come from two tables of a normal's quantiles, with one rounding in the sum and one in the product.
    `jax.random.normal` differs in the last bit between meshes: its erf_inv is rounded by how XLA cuts a loop into
    vectors (seen on a CPU: 4% of the elements of a weight).
    The sum of two draws of 65536 equally likely quantiles has a normal's moments to 1e-4 and reaches 6 sigma.
    """
    key = jax.random.fold_in(key, name)

    def numbers(key: Array) -> Array:
        bits = jax.random.bits(key, shape, jnp.uint32)
        return (first[bits >> 16] + second[bits & 0xFFFF]) * scale

    if layers is None:
        return numbers(key)
    return jax.vmap(lambda layer: numbers(jax.random.fold_in(key, layer)))(layers)


@cache
def _quantiles() -> np.ndarray:
    """float32[65536]: midpoint quantiles of the standard normal, scaled to variance 1."""
    upper = np.array([NormalDist().inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)])
    upper /= np.sqrt(np.mean(upper**2))
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)


@cache
def _step_biases(low: float, high: float, floor: float) -> np.ndarray:
    """float32[65536]: equally likely numbers whose softplus is log-uniform between `low` and `high`, at least `floor`.

    Mamba (Gu & Dao 2023, arXiv:2312.00752), section 3.6.
    """
    shares = (np.arange(65536) + 0.5) / 65536
    steps = np.maximum(np.exp(np.log(low) + shares * (np.log(high) - np.log(low))), floor)
    return (steps + np.log(-np.expm1(-steps))).astype(np.float32)
