"""Between the memory of this process and arrays that lie on the devices of several."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.base import processes
from llm_jax.sharding.plan import Plan

PIECE = 1 << 30
"""Bytes above which `to_first` brings a stacked weight together layer by layer."""

Part = tuple[int, int]


class Batches(Protocol):
    """`data.Loader`: batches as pure functions of the step, numbered from 0."""

    def iterate(self, start: int, stop: int, part: Part = (0, 1)) -> Iterator[dict[str, np.ndarray]]:
        """Batches of steps start .. stop-1: arrays `[microbatches, rows, ...]`; of `part=(i, n)` the i-th of n equal,
        contiguous parts of each microbatch's rows."""
        ...


def place(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` of host data that every process has whole; each puts only what its own devices hold.

    `shardings` has the tree's structure, or is one sharding for all of it, or None for this process's default device.
    """
    if not processes.several():
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if shardings is None:
        return jax.device_put(tree)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(one, tree, shardings)


def place_pieces(
    shape: tuple[int, ...], sharding: Any, pieces: Callable[[list[tuple[slice, ...]]], list[np.ndarray]]
) -> jax.Array:
    """An array of which this process makes no more than its devices hold.

    Args:
        shape: of the whole array.
        sharding: None for this process's default device.
        pieces: gives the parts at some indices: at each different one that devices of this process hold, once.
    """
    if sharding is None:
        (value,) = pieces([tuple(slice(0, size) for size in shape)])
        return jax.block_until_ready(jax.device_put(value))
    holders: dict[tuple[tuple[int, int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        where = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        holders.setdefault(where, []).append(device)
    values = pieces([tuple(slice(*part) for part in where) for where in holders])
    arrays = [jax.device_put(value, device) for value, devices in zip(values, holders.values()) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.block_until_ready(arrays))


def row_part(plan: Plan) -> Part:
    """Which part of a microbatch's rows the devices of this process hold: the i-th of n.

    Processes that share rows (a `tensor` axis that spans hosts) have the same part; one whose devices hold rows that
    are no such part reads all of them.
    """
    if not processes.several():
        return 0, 1
    (name,) = plan.activation_spec(("batch",))
    axis = plan.mesh.axis_names.index(name)
    mine = [place[axis] for place, device in np.ndenumerate(plan.mesh.devices) if _is_mine(device)]
    total, first, length = plan.axis_size(name), min(mine), len(set(mine))
    aligned = max(mine) - first + 1 == length and total % length == 0 and first % length == 0
    return (first // length, total // length) if aligned else (0, 1)


def _is_mine(device: Any) -> bool:
    return device.process_index == processes.index()


def place_batch(batch: Mapping[str, np.ndarray], plan: Plan, part: Part = (0, 1)) -> dict[str, jax.Array]:
    """A batch `[microbatches, rows, ...]`, rows cut over `data`, of which this process has read `part`."""
    sharding = plan.activation_sharding((None, "batch"))
    if not processes.several():
        return jax.device_put(dict(batch), sharding)
    i, n = part

    def one(x: np.ndarray) -> jax.Array:
        rows, first = x.shape[1] * n, x.shape[1] * i

        def mine(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(rows)
            return x[index[0], start - first : stop - first]

        return jax.make_array_from_callback((x.shape[0], rows, *x.shape[2:]), sharding, mine)

    return {name: one(x) for name, x in batch.items()}


def placed_batches(batches: Batches, plan: Plan, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
    """Batches start .. stop-1 on the devices; each process reads its own rows only."""
    part = row_part(plan)
    for batch in batches.iterate(start, stop, part):
        yield place_batch(batch, plan, part)


def to_first(tree: Any, piece: int = PIECE) -> Any:
    """A tree of arrays as np arrays in process 0 and None in the others; alone the tree itself. All call it.

    The devices hold one array whole at a time; of one larger than `piece` bytes, one entry of its first axis.
    """
    if not processes.several():
        return tree
    return jax.tree.map(lambda x: _to_first(x, piece), tree)


def _to_first(x: jax.Array, piece: int) -> np.ndarray | None:
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0)) if processes.first() else None
    assert isinstance(x.sharding, NamedSharding), "what spans processes lies on a mesh"
    whole = NamedSharding(x.sharding.mesh, PartitionSpec())
    if x.nbytes <= piece or x.ndim < 2:
        gathered = jax.jit(lambda x: x, out_shardings=whole)(x)
        return np.asarray(gathered.addressable_data(0)) if processes.first() else None
    entry = jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=whole)
    out = np.empty(x.shape, x.dtype) if processes.first() else None
    for i in range(x.shape[0]):
        gathered = entry(x, jnp.int32(i)).addressable_data(0)
        gathered.block_until_ready()
        if out is not None:
            out[i] = np.asarray(gathered)
    return out
