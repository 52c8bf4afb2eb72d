"""Weights put on devices piece by piece."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.sharding import MeshConfig, make_plan, place_pieces

SPECS = [(), ("data",), (None, "tensor"), ("tensor", "data"), (None, None, ("data", "tensor"))]


@pytest.mark.parametrize("spec", SPECS)
def test_each_piece_is_asked_for_once(spec):
    plan = make_plan(MeshConfig(data=4, tensor=2))
    whole = np.arange(8 * 16 * 24, dtype=np.float32).reshape(8, 16, 24)
    sharding, asked = NamedSharding(plan.mesh, PartitionSpec(*spec)), []

    def pieces(indices):
        asked.extend(indices)
        return [np.ascontiguousarray(whole[index]) for index in indices]

    found = place_pieces(whole.shape, sharding, pieces)
    np.testing.assert_array_equal(found, whole)
    assert found.sharding == sharding
    assert len(asked) == len({str(index) for index in sharding.devices_indices_map(whole.shape).values()})
    # Devices may share a host's copy; one that is given away is then not written to.
    used = jax.jit(lambda x: x + 1, donate_argnums=0)(place_pieces(whole.shape, sharding, pieces))
    np.testing.assert_array_equal(used, whole + 1)
    np.testing.assert_array_equal(found, whole)


def test_the_default_device():
    whole = np.arange(6.0, dtype=np.float32)
    assert place_pieces((6,), None, lambda indices: [whole[indices[0]]]).devices() == {jax.devices()[0]}
    assert float(place_pieces((), None, lambda indices: [np.full((), 3, np.float32)])) == 3
