"""Nested dicts with string keys, the shape of every parameter tree, and their slash-joined paths."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` -> `{"a/b": x}`. Empty dicts vanish."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            out.update(flatten(value, path))
        else:
            out[path] = value
    return out


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def tree_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of all leaves that have a `size` and a `dtype` (arrays, ShapeDtypeStructs)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in flatten(tree).values())
