"""Meshes, the axis table, storage and compute specs."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax.base.errors import UserError
from llm_jax.sharding import MeshConfig, check_divides, make_plan
from llm_jax.sharding.axes import WEIGHT_AXES, spec_of


@pytest.mark.parametrize(
    "mesh, shape",
    [
        (MeshConfig(), (8, 1)),
        (MeshConfig(tensor=2), (4, 2)),
        (MeshConfig(data=2, tensor=4), (2, 4)),
        (MeshConfig(data=2), (2, 1)),
        (MeshConfig(data=1), (1, 1)),
    ],
)
def test_mesh_shapes(mesh: MeshConfig, shape: tuple[int, int]):
    plan = make_plan(mesh)
    assert tuple(plan.mesh.shape[a] for a in ("data", "tensor")) == shape


@pytest.mark.parametrize(
    "mesh, words",
    [
        (MeshConfig(data=3), "data=3"),
        (MeshConfig(tensor=3), "tensor=3"),
        (MeshConfig(data=8, tensor=2), "does not divide the 8 devices"),
        (MeshConfig(data=0), "mesh.data is 0"),
        (MeshConfig(tensor=-1), "mesh.tensor is -1"),
        (MeshConfig(zero=4), "mesh.zero is 4"),
    ],
)
def test_meshes_that_cannot_be(mesh: MeshConfig, words: str):
    with pytest.raises(UserError, match=words) as caught:
        make_plan(mesh)
    assert "\n" not in str(caught.value)


def test_sizes_that_the_mesh_does_not_divide():
    plan = make_plan(MeshConfig(data=2, tensor=4))
    check_divides(plan, {"batch": 6, "heads": 8, "kv_heads": 4, "mlp": 12, "vocab": 20, "embed": 7})
    with pytest.raises(UserError, match="mesh.tensor=4 does not divide kv_heads=2"):
        check_divides(plan, {"heads": 8, "kv_heads": 2})
    with pytest.raises(UserError, match="mesh.data=2 does not divide batch=3"):
        check_divides(plan, {"batch": 3})


def test_specs_by_stage():
    axes, shape = ("layers", "embed", "mlp"), (8, 16, 48)
    for zero, storage, gradient in [
        (0, P(None, None, "tensor"), P(None, None, "tensor")),
        (1, P(None, "data", "tensor"), P(None, None, "tensor")),
        (2, P(None, "data", "tensor"), P(None, "data", "tensor")),
        (3, P(None, "data", "tensor"), P(None, "data", "tensor")),
    ]:
        plan = make_plan(MeshConfig(data=4, tensor=2, zero=zero))
        assert plan.compute_spec(axes) == P(None, None, "tensor")
        assert plan.storage_spec(axes, shape) == storage
        assert plan.gradient_spec(axes, shape) == gradient
        # The stacked and the single tensor are cut alike: the layers axis never decides.
        assert tuple(plan.storage_spec(axes[1:], shape[1:])) == tuple(storage)[1:]


def test_storage_takes_the_largest_dimension_that_divides():
    plan = make_plan(MeshConfig(data=4, tensor=1, zero=1))
    assert plan.storage_spec(("embed", "norm"), (16, 32)) == P(None, "data")
    assert plan.storage_spec(("embed", "norm"), (16, 30)) == P("data", None)
    assert plan.storage_spec(("norm",), (6,)) == P(None)
    assert plan.storage_spec(("layers", "norm"), (8, 6)) == P(None, None)
    # heads stay on tensor, so data takes the embedding, small as it is
    tensor = make_plan(MeshConfig(data=4, tensor=2, zero=1))
    assert tensor.storage_spec(("embed", "heads"), (8, 64)) == P("data", "tensor")


def test_collisions_and_unknown_names():
    with pytest.raises(ValueError, match="collide"):
        spec_of(("heads", "mlp"), WEIGHT_AXES)
    with pytest.raises(ValueError, match="unknown logical axis 'header'"):
        spec_of(("header",), WEIGHT_AXES)


def test_a_plan_on_some_devices():
    plan = make_plan(MeshConfig(), devices=jax.devices()[:2])
    assert plan.mesh.size == 2
