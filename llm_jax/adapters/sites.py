"""Where an adapter's parameters lie: the places of a configuration, stacked as the model's layers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.matching import Chosen, check_config, choose
from llm_jax.adapters.places import Place, in_stack, places, row_of, running_tensors
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.families.tensors import Tensor
from llm_jax.models.parameter import LAYERS, Declaration, Init, abstract_params, declarations

PROJECTIONS = ("classifier", "score")
"""What PEFT trains whole of every model that ends in scores; each has one of them, whose name depends on its class."""


@dataclass(frozen=True)
class Site:
    """A weight of theirs in all layers of a stack, or one outside of the layers.

    Its parameters are `PATH/a` `[layers, experts, inputs, rank]` and `PATH/b` `[layers, experts, rank, outputs]`, as
    far as there are layers and experts, outputs in their order; with DoRA `PATH/magnitude` `[layers, outputs]`. Rank
    is the largest of the layers: what is over in others is zero, takes no gradient, and is not written.
    """

    path: str
    place: Place
    """Of the first layer."""
    parts: tuple[str, ...]
    """Paths of our modules in the decoder."""
    rows: tuple[Chosen | None, ...]
    """By layer of the stack, None where that one has no adapter; a single one outside of the layers."""
    layers: tuple[int, ...] | None

    @property
    def rank(self) -> int:
        return max(row.rank for row in self.rows if row is not None)

    @property
    def scales(self) -> np.ndarray:
        """float32[layers, rank] or [rank]: the update's scale, 0 where there is no rank."""
        found = np.zeros((len(self.rows), self.rank), np.float32)
        for scales, row in zip(found, self.rows):
            if row is not None:
                scales[: row.rank] = row.scale
        return found[0] if self.layers is None else found

    @property
    def chosen(self) -> list[tuple[int, Chosen]]:
        """The rows that have an adapter, by number."""
        return [(i, row) for i, row in enumerate(self.rows) if row is not None]


class Adaptation:
    """One adapter on a model: its sites, and what else of the model it trains.

    Attributes:
        decoder: the model's own, abstract.
        config: as given.
        sites: in the model's order.
        saved: parameters that the adapter has a copy of, trained whole, by path in the model.
        declarations: of the adapter's parameters, a tree.
        abstract: float32 shapes of them.
    """

    def __init__(self, decoder: Decoder, config: LoraConfig):
        """Raises UserError as `check_config` and `choose`, and for saved modules that are not there."""
        check_config(config)
        self.decoder, self.config = decoder, config
        self.sites = _stacked(decoder, choose(config, places(decoder)))
        if config.init_lora_weights == "orthogonal":
            for site in self.sites:
                if odd := next((row for _, row in site.chosen if row.rank % 2), None):
                    raise UserError(
                        f"adapter.init_lora_weights=orthogonal: {odd.place.module} has the odd r {odd.rank}"
                    )
        self.saved_tensors = _saved_tensors(decoder, config, self.sites)
        self.saved = tuple(dict.fromkeys(
            in_stack(decoder, path, t.layer) for _, t in self.saved_tensors for path in t.paths
        ))  # fmt: skip
        declared = flatten(declarations(decoder))
        shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(decoder)).items()}
        _check_whole(decoder, shapes, self.saved_tensors, config)
        own = {path: (shapes[path], declared[path]) for path in self.saved}
        for site in self.sites:
            own |= _parameters(site, declared[f"{site.parts[0]}/weight"], config.use_dora)
        self.declarations = unflatten({path: declaration for path, (_, declaration) in own.items()})
        self.abstract = unflatten({p: jax.ShapeDtypeStruct(shape, jnp.float32) for p, (shape, _) in own.items()})

    @property
    def num_parameters(self) -> int:
        """As a PEFT folder has them: without what fills stacks up."""
        saved = sum(int(np.prod(flatten(self.abstract)[path].shape)) for path in self.saved)
        return saved + sum(
            (place.inputs + place.outputs) * row.rank * (place.experts or 1)
            + (place.outputs if self.config.use_dora else 0)
            for site in self.sites
            for _, row in site.chosen
            for place in [site.place]
        )


def _stacked(decoder: Decoder, chosen: Sequence[Chosen]) -> tuple[Site, ...]:
    found: dict[str, Site] = {}
    rows: dict[str, list[Chosen | None]] = {}
    for item in chosen:
        place = item.place
        parts = tuple(in_stack(decoder, part, place.layer) for part in place.parts)
        layers, row, start = None, 0, ""
        if place.layer is not None:
            s, position, row = row_of(decoder, place.layer)
            layers, start = tuple(decoder.groups[s].layers(position)), f"segments/{s}/{position}/"
        # Within a layer, the name after the layer's number.
        inner = place.name if place.layer is None else place.name.split(f".{place.layer}.", 1)[1]
        path = f"{start}lora/{inner.removesuffix('.weight')}"
        found.setdefault(path, Site(path, place, parts, (), layers))
        rows.setdefault(path, [None] * len(layers or (0,)))[row] = item
    return tuple(Site(s.path, s.place, s.parts, tuple(rows[p]), s.layers) for p, s in found.items())


def _parameters(site: Site, weight: Declaration, dora: bool) -> dict[str, tuple[tuple[int, ...], Declaration]]:
    place, lead = site.place, [] if site.layers is None else [(len(site.layers), LAYERS)]
    # A weight of theirs may hold parts that are cut along different axes: its outputs then are not cut.
    output_axis = weight.axes[-1] if len(site.parts) == 1 else "rank"
    before = lead + ([] if place.experts is None else [(place.experts, "experts")])

    def matrix(rows: tuple[int, str], columns: tuple[int, str]) -> tuple[tuple[int, ...], Declaration]:
        n, sides = len(before), [*before, rows, columns]
        form = Declaration(tuple(a for _, a in sides), ((n,), (n + 1,)), True, Init("zeros"))
        return tuple(size for size, _ in sides), form

    found = {
        f"{site.path}/a": matrix((place.inputs, weight.axes[-2]), (site.rank, "rank")),
        f"{site.path}/b": matrix((site.rank, "rank"), (place.outputs, output_axis)),
    }
    if dora:
        sides = [*lead, (place.outputs, output_axis)]
        form = Declaration(tuple(a for _, a in sides), None, False, Init("ones"))
        found[f"{site.path}/magnitude"] = (tuple(size for size, _ in sides), form)
    return found


def _saved_tensors(decoder: Decoder, config: LoraConfig, sites: Sequence[Site]) -> list[tuple[str, Tensor]]:
    """Names in a running model and what they hold, of all that is trained whole."""
    every = running_tensors(decoder)
    found: dict[str, Tensor] = {}
    for wanted in config.modules_to_save or ():
        own = {}
        for name, tensor in every:
            words = name.split(".")
            # As PEFT: a module whose name ends so, however the ending begins.
            if any(".".join(words[:n]).endswith(wanted) for n in range(1, len(words))):
                own[name] = tensor
        if not own and (wanted not in PROJECTIONS or decoder.config.head.labels is None):
            raise UserError(f"adapter.modules_to_save {wanted!r} matches no module")
        found |= own
    if config.bias == "none":
        return list(found.items())
    adapted = {row.place.module for site in sites for _, row in site.chosen}
    for name, tensor in every:
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and (config.bias == "all" or module in adapted):
            found.setdefault(name, tensor)
    return list(found.items())


def _check_whole(
    decoder: Decoder, shapes: Mapping[str, Any], saved: Sequence[tuple[str, Tensor]], config: LoraConfig
) -> None:
    """Raises UserError where only some layers of a stack would be trained whole."""
    layers: dict[str, set[int]] = {}
    for _, tensor in saved:
        if tensor.layer is not None:
            for path in tensor.paths:
                layers.setdefault(in_stack(decoder, path, tensor.layer), set()).add(tensor.layer)
    for path, own in layers.items():
        if len(own) != shapes[path][0]:
            raise UserError(
                f"adapter: {path} would be trained whole in {len(own)} of the {shapes[path][0]} layers that share an "
                f"array (modules_to_save={config.modules_to_save}, bias={config.bias}); take all of them or none"
            )
