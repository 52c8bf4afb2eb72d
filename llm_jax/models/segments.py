"""Layers grouped for `lax.scan`: a segment is a block of one or more layers, repeated.

The parameters of a segment are stacked over its repeats. How layers are grouped is free (a checkpoint records it as
its layout, and `regroup` takes a tree from one layout to another), and changes no number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.config import FeedForwardKind, Mixer, ModelConfig, Sight

Grouping = Literal["scan", "unrolled"] | Sequence[int]
Rope = Literal["none", "all", "local"]
Layout = dict[str, list[list[list[int]]]]


@dataclass(frozen=True)
class LayerSpec:
    """What a layer is made of; layers of equal specs can share a segment."""

    mixer: Mixer = "attention"
    feed_forward: FeedForwardKind = "dense"
    sees: Sight = "full"
    rope: Rope = "all"
    """Which rotation its queries and keys get: none, the model's, or that of sliding layers."""
    divisor: int = 1
    """Of attention's scores."""
    normed: bool = True
    """Whether a norm comes before the mixer, where the model has one there."""


@dataclass(frozen=True)
class Segment:
    """Layers `first ... first + len(block) * repeats - 1`: the specs of `block`, over and over."""

    block: tuple[LayerSpec, ...]
    repeats: int
    first: int

    @property
    def num_layers(self) -> int:
        return len(self.block) * self.repeats

    def layers(self, position: int) -> list[int]:
        """Layer indices of the rows stacked at one position of the block."""
        return [self.first + row * len(self.block) + position for row in range(self.repeats)]


def layer_specs(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """One spec per layer, first to last."""
    config = config.resolved()
    assert config.sights is not None and config.mixers is not None and config.feed_forwards is not None

    def spec(layer: int, sees: Sight, mixer: Mixer, feed_forward: FeedForwardKind) -> LayerSpec:
        normed = config.first_norm or layer > 0
        if mixer not in ("attention", "latent"):
            return LayerSpec(mixer, feed_forward, rope="none", normed=normed)
        turns = config.rope_layers is not None and config.rope_layers[layer]
        local = sees == "sliding" and config.local_rope_theta is not None
        rope: Rope = ("local" if local else "all") if turns else "none"
        return LayerSpec(mixer, feed_forward, sees, rope, layer + 1 if config.scale_by_depth else 1, normed)

    layers = zip(range(config.num_layers), config.sights, config.mixers, config.feed_forwards)
    return tuple(spec(*layer) for layer in layers)


def further_spec(config: ModelConfig) -> LayerSpec:
    """That of the layers for further tokens (`mtp`), which mix tokens as the last layer with such a mixer."""
    config = config.resolved()
    assert config.mtp_mixer is not None and config.mtp_feed_forward is not None
    like = [spec for spec in layer_specs(config) if spec.mixer == config.mtp_mixer][-1]
    return replace(like, feed_forward=config.mtp_feed_forward)


def _repeats(specs: Sequence[LayerSpec], start: int, period: int) -> int:
    count = 1
    while specs[start + count * period : start + (count + 1) * period] == specs[start : start + period]:
        count += 1
    return count


def group(specs: Sequence[LayerSpec], grouping: Grouping = "scan") -> tuple[Segment, ...]:
    """Segments that cover `specs` in order.

    `scan` takes, from the front, whichever block covers most layers by repeating (the shorter block if equal);
    `unrolled` makes a segment of each layer; a list of sizes cuts the layers there and groups within each piece.
    """
    specs = tuple(specs)
    if grouping == "unrolled":
        grouping = [1] * len(specs)
    if not isinstance(grouping, str):
        if sum(grouping) != len(specs) or min(grouping, default=1) < 1:
            raise UserError(f"segments {list(grouping)} do not add up to the model's {len(specs)} layers")
        starts = [sum(grouping[:i]) for i in range(len(grouping))]
        return tuple(
            Segment(s.block, s.repeats, start + s.first)
            for start, size in zip(starts, grouping)
            for s in group(specs[start : start + size])
        )
    segments, start = [], 0
    while start < len(specs):
        best_period, best_repeats = 1, _repeats(specs, start, 1)
        for period in range(2, (len(specs) - start) // 2 + 1):
            count = _repeats(specs, start, period)
            if count > 1 and count * period > best_repeats * best_period:
                best_period, best_repeats = period, count
        segments.append(Segment(specs[start : start + best_period], best_repeats, start))
        start += best_period * best_repeats
    return tuple(segments)


def layout_of(segments: Sequence[Segment]) -> Layout:
    """The grouping as plain lists for a checkpoint's metadata: `["segments"][s][position][row]` is a layer index."""
    return {"segments": [[s.layers(position) for position in range(len(s.block))] for s in segments]}


def per_layer(tree: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """`tree["segments"]` of a params-like tree, cut into one tree per layer (no copies of NumPy arrays).

    A tree of a part of the parameters (what an optimizer keeps of some) gives each layer's part, empty for some.
    """
    layers: dict[int, dict[str, Any]] = {}
    for s, positions in enumerate(layout["segments"]):
        for position, indices in enumerate(positions):
            flat = flatten(tree["segments"].get(str(s), {}).get(str(position), {}))
            for row, layer in enumerate(indices):
                layers[layer] = unflatten({path: leaf[row] for path, leaf in flat.items()})
    return [layers[i] for i in range(len(layers))]


def _shared_paths(layers: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> list[str]:
    for path in {path: None for i in rows for path in layers[i]}:
        if any(path not in layers[i] for i in rows):
            raise UserError(f"{path} of layers {', '.join(map(str, rows))} can't be stacked: only some have it here")
    return list(layers[rows[0]])


def regroup(tree: Mapping[str, Any], from_layout: Layout, to_layout: Layout, stack: Any = np.stack) -> dict[str, Any]:
    """The tree with every `segments` subtree restacked from one layout to another.

    Works on parameters and on whatever holds trees of their paths with layers in front (an optimizer's moments, also
    factored ones, and of some parameters only; a whole state by role). Leaves are NumPy arrays; `stack=jnp.stack` takes
    JAX arrays, under jit too. Raises UserError when the layouts differ in layers, or where only some layers of a stack
    have a leaf.
    """
    if from_layout == to_layout:
        return dict(tree)
    before, after = (sorted(i for s in each["segments"] for p in s for i in p) for each in (from_layout, to_layout))
    if before != after:
        raise UserError(f"a layout of {len(before)} layers cannot be regrouped into one of {len(after)}")
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "segments":
            layers = [flatten(layer) for layer in per_layer(tree, from_layout)]
            out[key] = {
                str(s): {
                    str(position): unflatten(
                        {path: stack([layers[i][path] for i in rows]) for path in _shared_paths(layers, rows)}
                    )
                    for position, rows in enumerate(positions)
                }
                for s, positions in enumerate(to_layout["segments"])
            }
        elif isinstance(value, Mapping):
            out[key] = regroup(value, from_layout, to_layout, stack)
        else:
            out[key] = value
    return out
