"""Mesh and ZeRO stage, as plain fields."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeshConfig:
    data: int = -1
    """Devices along the data axis; -1 takes all that remain."""
    tensor: int = 1
    """Devices along the tensor axis (heads, feed-forward width, vocabulary)."""
    zero: int = 0
    """ZeRO stage: 0 replicates; 1 shards masters and optimizer state; 2 also gradients; 3 also compute weights."""
