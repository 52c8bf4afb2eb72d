"""The one table from logical axis names to mesh axes, for weights and for activations."""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

MESH_AXES = ("data", "tensor")
RESERVED_MESH_AXES = ("replica", "pipeline", "sequence", "expert")

WEIGHT_AXES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": None,  # for the mesh axis `expert`
    "router": None,
    "inner": "tensor",
    "inner_rates": "tensor",
    "ssm_heads": "tensor",
    "ssm_heads_rates": "tensor",
    "ssm_state": None,
    "conv_width": None,
    "embed": None,
    "norm": None,
    "labels": None,
    "latent": None,
    "head_dim": None,
    "rank": None,
    "rank_scales": None,
    "statistics": None,
    "layers": None,
}
ACTIVATION_AXES: dict[str, str | None] = {
    "batch": "data",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "inner": "tensor",
    "ssm_heads": "tensor",
    "ssm_state": None,
    "vocab": "tensor",
    "experts": None,  # for the mesh axis `expert`
    "length": None,
    "embed": None,
    "head_dim": None,
}
# Weights with one of these are used in float32, whatever the compute dtype: a rounded router picks other experts, and
# how fast a state fades acts once for every token that it lives through; a mean of a run is no weight.
FLOAT32_AXES = ("router", "inner_rates", "ssm_heads_rates", "rank_scales", "statistics")
# ZeRO cuts weights over this axis, wherever the table leaves a dimension free.
STORAGE_AXIS = "data"
# The layer loop slices this axis, so a cut along it would put whole layers on single devices.
NEVER_STORED_APART = "layers"


def mesh_axis(name: str | None, table: dict[str, str | None]) -> str | None:
    """The mesh axis of a logical axis. None (no name) is never cut. Raises ValueError if unknown."""
    if name is None:
        return None
    if name not in table:
        raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(sorted(table))}")
    return table[name]


def spec_of(names: Sequence[str | None], table: dict[str, str | None]) -> PartitionSpec:
    """PartitionSpec with an entry per logical axis. Raises ValueError where two of them share one mesh axis."""
    entries = [mesh_axis(name, table) for name in names]
    used = [entry for entry in entries if entry is not None]
    for entry in used:
        if used.count(entry) > 1:
            raise ValueError(f"axes {tuple(names)} collide: more than one is cut along mesh axis {entry!r}")
    return PartitionSpec(*entries)
