"""What of a batch each process reads and places; processes are pretended, devices of the mesh shared out among them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llm_jax.base import processes
from llm_jax.sharding import placement
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.placement import place, place_batch, row_part, to_first
from llm_jax.sharding.plan import make_plan


def owned(monkeypatch: pytest.MonkeyPatch, index: int, owners: list[int]) -> None:
    """Makes this process number `index` of several; device i of the mesh is of process `owners[i]`."""
    monkeypatch.setattr(processes, "_group", SimpleNamespace(index=index, count=len(set(owners))))
    order = {device.id: owner for device, owner in zip(jax.devices(), owners)}
    monkeypatch.setattr(placement, "_is_mine", lambda device: order[device.id] == index)


@pytest.mark.parametrize(
    ("data", "owners", "parts"),
    [
        (8, [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        (8, [0, 0, 1, 1, 2, 2, 3, 3], [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # A tensor axis inside of each process, and one across two.
        (4, [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        (2, [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (1, [0, 0, 0, 0, 1, 1, 1, 1], [(0, 1), (0, 1)]),
        # Rows that are no equal, contiguous part: all are read.
        (8, [0, 1, 0, 1, 0, 1, 0, 1], [(0, 1), (0, 1)]),
        (8, [0, 0, 0, 1, 1, 1, 1, 1], [(0, 1), (0, 1)]),
    ],
)
def test_row_part(monkeypatch, data, owners, parts):
    plan = make_plan(MeshConfig(data=data, tensor=8 // data))
    for index, part in enumerate(parts):
        owned(monkeypatch, index, owners)
        assert row_part(plan) == part


def test_a_placed_batch_asks_for_the_rows_that_were_read(monkeypatch):
    plan = make_plan(MeshConfig(data=4, tensor=2))
    batch = {"tokens": np.arange(2 * 8 * 3).reshape(2, 8, 3), "weight": np.arange(16.0).reshape(2, 8)}
    asked = {}

    def assemble(shape, sharding, callback):
        """As jax, for the devices of process 1: rows 4 to 7."""
        places = sharding.devices_indices_map(shape)
        asked[shape] = [callback(places[device]) for device in plan.mesh.devices[2:].flat]
        return shape

    owned(monkeypatch, 1, [0, 0, 0, 0, 1, 1, 1, 1])
    monkeypatch.setattr(jax, "make_array_from_callback", assemble)
    part = row_part(plan)
    assert part == (1, 2)
    read = {name: array[:, 4:] for name, array in batch.items()}
    assert place_batch(read, plan, part) == {"tokens": (2, 8, 3), "weight": (2, 8)}
    for name, array in batch.items():
        expected = [array[:, 4:6], array[:, 4:6], array[:, 6:8], array[:, 6:8]]
        for got, want in zip(asked[array.shape], expected, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=name)


def test_arrays_come_together_in_process_0_whole_or_layer_by_layer(monkeypatch):
    plan = make_plan(MeshConfig(data=8, zero=3))
    whole = {"stacked": np.arange(3 * 16 * 4.0).reshape(3, 16, 4), "norm": np.arange(5.0), "odd": np.arange(24)}
    specs = {name: plan.storage_sharding(("layers", "embed", None)[: x.ndim], x.shape) for name, x in whole.items()}
    arrays = {name: jax.device_put(x, specs[name]) for name, x in whole.items()}
    assert to_first(arrays) is arrays
    owned(monkeypatch, 0, [0] * 4 + [1] * 4)
    for piece in (1 << 30, 0):
        for name, got in to_first(arrays, piece).items():
            assert isinstance(got, np.ndarray) and got.dtype == arrays[name].dtype
            np.testing.assert_array_equal(got, whole[name])
    owned(monkeypatch, 1, [0] * 4 + [1] * 4)
    assert to_first(arrays, 0) == dict.fromkeys(whole)


def test_host_data_lies_where_it_is_to_lie(monkeypatch):
    plan = make_plan(MeshConfig(data=8))
    tree = {"a": np.arange(16.0), "b": {"c": np.ones((3, 8), np.int32)}}
    shardings = {"a": plan.activation_sharding(("batch",)), "b": {"c": plan.activation_sharding((None, "batch"))}}
    alone = place(tree, shardings)
    owned(monkeypatch, 0, [0] * 8)
    several = place(tree, shardings)
    for name, got, want in (("a", several["a"], alone["a"]), ("c", several["b"]["c"], alone["b"]["c"])):
        assert got.sharding == want.sharding and got.dtype == want.dtype, name
        np.testing.assert_array_equal(got, want)
    assert place(np.ones(3), None).sharding == jax.device_put(np.ones(3)).sharding
