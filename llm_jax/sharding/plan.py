"""A plan: the mesh, the ZeRO stage, the compute dtype, and the specs that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax.base.errors import UserError
from llm_jax.sharding.axes import ACTIVATION_AXES, MESH_AXES, NEVER_STORED_APART, STORAGE_AXIS, WEIGHT_AXES, spec_of
from llm_jax.sharding.config import MeshConfig


@dataclass(frozen=True, eq=False)
class Plan:
    """How one program is spread over devices. Compared by identity: each plan is traced and compiled for itself."""

    mesh: Mesh
    zero: int = 0
    """ZeRO stage: 0 replicates; 1 cuts masters and optimizer state over `data`; 2 gradients too; 3 weights too."""
    compute_dtype: Any = jnp.float32
    weight_axes: Mapping[str, str | None] = field(default_factory=lambda: WEIGHT_AXES)
    activation_axes: Mapping[str, str | None] = field(default_factory=lambda: ACTIVATION_AXES)

    @property
    def rules(self) -> dict[str, Mapping[str, str | None]]:
        return {"weights": self.weight_axes, "activations": self.activation_axes}

    def axis_size(self, mesh_axis: str | None) -> int:
        """Devices along a mesh axis; 1 for None."""
        return 1 if mesh_axis is None else self.mesh.shape[mesh_axis]

    def compute_spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Spec of a weight while it is used."""
        return spec_of(axes, dict(self.weight_axes))

    def storage_spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Spec of a weight's float32 master, gradient and optimizer state between uses.

        The compute spec, and in ZeRO 1-3 also `data` along the largest dimension that is still whole and that `data`
        divides, never along `layers`. Tensors without such a dimension stay replicated over `data`.
        """
        spec = self.compute_spec(axes)
        if self.zero == 0:
            return spec
        size = self.axis_size(STORAGE_AXIS)
        free = [
            (length, -i)
            for i, (name, length, used) in enumerate(zip(axes, shape, spec))
            if used is None and name != NEVER_STORED_APART and length and length % size == 0
        ]
        if not free:
            return spec
        cut = -max(free)[1]
        return PartitionSpec(*(STORAGE_AXIS if i == cut else used for i, used in enumerate(spec)))

    def gradient_spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Spec of accumulated gradients: as stored in ZeRO 2 and 3, as computed below."""
        return self.storage_spec(axes, shape) if self.zero >= 2 else self.compute_spec(axes)

    def activation_spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """Spec of an activation."""
        return spec_of(names, dict(self.activation_axes))

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def storage_sharding(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        return self.sharding(self.storage_spec(axes, shape))

    def activation_sharding(self, names: Sequence[str | None]) -> NamedSharding:
        return self.sharding(self.activation_spec(names))


def make_plan(
    mesh: MeshConfig | None = None, *, devices: Sequence[Any] | None = None, compute_dtype: Any = "float32"
) -> Plan:
    """The plan of a mesh configuration on `devices` (default: all of them).

    `data=-1` takes all devices that `tensor` leaves. Sizes given in full may use fewer devices than there are (on one
    host), never more. Raises UserError where the sizes do not divide the devices.
    """
    mesh = mesh or MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    _check_sizes(mesh)
    data = len(devices) // mesh.tensor if mesh.data == -1 else mesh.data
    shape = (data, mesh.tensor)
    used = data * mesh.tensor
    if used == 0 or len(devices) % used or (mesh.data == -1 and used != len(devices)):
        raise UserError(
            f"mesh data={mesh.data} x tensor={mesh.tensor} does not divide the {len(devices)} devices of this run"
        )
    if used != len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh data={data} x tensor={mesh.tensor} leaves devices unused; with several hosts use them all"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    if used == len(devices) and used > 1:
        grid = jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    else:
        grid = Mesh(np.array(devices[:used]).reshape(shape), MESH_AXES, axis_types=types)
    return Plan(grid, mesh.zero, jnp.dtype(compute_dtype))


def abstract_plan(mesh: MeshConfig, *, compute_dtype: Any = "float32") -> Plan:
    """The plan of as many devices as a mesh says, none of which have to exist: for shapes, shards and bytes.

    `data=-1` counts as 1. Raises UserError for sizes that are no numbers of devices.
    """
    _check_sizes(mesh)
    shape = (max(mesh.data, 1), mesh.tensor)
    grid = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Plan(cast(Mesh, grid), mesh.zero, jnp.dtype(compute_dtype))


def _check_sizes(mesh: MeshConfig) -> None:
    if mesh.zero not in (0, 1, 2, 3):
        raise UserError(f"mesh.zero is {mesh.zero}; ZeRO stages are 0, 1, 2, 3")
    for name in MESH_AXES:
        size = getattr(mesh, name)
        if size < 1 and not (name == "data" and size == -1):
            raise UserError(f"mesh.{name} is {size}; it must be a positive number of devices")


def check_divides(plan: Plan, sizes: Mapping[str, int]) -> None:
    """Raises UserError for the first logical axis whose size its mesh axis does not divide.

    `sizes` maps names of the tables to sizes: `{"batch": 8, "heads": 4, "kv_heads": 2, "mlp": 384, "vocab": 512}`.
    """
    tables = {**plan.weight_axes, **plan.activation_axes}
    for name, size in sizes.items():
        axis = tables[name]
        if axis is not None and size % plan.axis_size(axis):
            raise UserError(f"mesh.{axis}={plan.axis_size(axis)} does not divide {name}={size}")


def storage_shardings(declarations: Mapping[str, Any], shapes: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """NamedSharding of every parameter as stored.

    `declarations` is a nested dict whose leaves have `.axes`; `shapes` is a dict of the same nesting whose leaves have
    `.shape` (arrays or ShapeDtypeStructs).
    """
    return {
        key: storage_shardings(value, shapes[key], plan)
        if isinstance(value, Mapping)
        else plan.storage_sharding(value.axes, shapes[key].shape)
        for key, value in declarations.items()
    }
