"""Which matrices of a model an adapter can be on, under the names that its modules have in transformers.

transformers' modules need not be ours: one of theirs may hold several (`qkv_proj`), and a layer's experts are one
parameter. An adapter belongs to a module of theirs, whatever it is made of here; so it can be written and read as PEFT
has it, and is trained as it is trained there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llm_jax.base.trees import flatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.experts import ExpertLinear
from llm_jax.models.families import family
from llm_jax.models.families.tensors import Tensor
from llm_jax.models.layers import Embedding, Linear
from llm_jax.models.parameter import abstract_params
from llm_jax.models.router import Router

Kind = Literal["linear", "embedding", "experts", "router"]
KINDS: tuple[tuple[type, Kind], ...] = (
    (Linear, "linear"),
    (Embedding, "embedding"),
    (ExpertLinear, "experts"),
    (Router, "router"),
)


@dataclass(frozen=True)
class Place:
    """A weight of theirs that an adapter can be on."""

    module: str
    """Theirs: `model.layers.3.self_attn.qkv_proj`."""
    parameter: str
    """Of the module: `weight`, or of experts `gate_up_proj`."""
    kind: Kind
    layer: int | None
    parts: tuple[str, ...]
    """Our modules that it holds, within the layer: `attention/q`, ..."""
    columns: tuple[tuple[int, ...], ...]
    """For each of them its outputs, among theirs in order."""
    inputs: int
    outputs: int
    experts: int | None
    """How many, where the weight is a stack of as many matrices."""
    turned: bool
    """Whether PEFT takes the outputs of the weight for its inputs."""

    @property
    def name(self) -> str:
        """Of the parameter."""
        return f"{self.module}.{self.parameter}"


def running_tensors(decoder: Decoder) -> list[tuple[str, Tensor]]:
    """The parameters of the model as transformers 5 runs it: names there, and what of ours they hold."""
    fam = family(decoder.config.family)
    found = []
    for tensor in fam.tensors(decoder, frozenset(getattr(fam, "ALL", ()))):
        if len(tensor.names) == 1 and not tensor.paths[0].startswith("mtp/"):
            found.append((fam.running(tensor.names[0]), tensor))
    return found


def places(decoder: Decoder) -> list[Place]:
    """All of them, top to bottom. `decoder` is abstract."""
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(decoder)).items()}
    swapped = family(decoder.config.family).EXPERTS_TURNED
    found = []
    for name, tensor in running_tensors(decoder):
        modules = [path.rpartition("/")[0] for path in tensor.paths]
        if any(path.rpartition("/")[2] != "weight" for path in tensor.paths):
            continue
        whole = [in_stack(decoder, module, tensor.layer) for module in modules]
        kind = kind_of(module_at(decoder, whole[0]))
        if kind is None:
            continue
        stacked = 1 if tensor.layer is not None else 0
        ours = [shapes[f"{path}/weight"][stacked:] for path in whole]
        module, _, parameter = name.rpartition(".")
        columns = _columns(tensor, ours)
        experts = ours[0][0] if kind == "experts" else None
        found.append(
            Place(
                module, parameter, kind, tensor.layer, tuple(modules), columns, ours[0][-2],
                sum(map(len, columns)), experts, kind == "experts" and swapped,
            )
        )  # fmt: skip
    return found


def _columns(tensor: Tensor, ours: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """By writing a tensor of theirs from matrices of one input, whose outputs are numbered."""
    starts = np.cumsum([0, *(shape[-1] for shape in ours)])
    numbered = [
        np.broadcast_to(np.arange(start, start + shape[-1]), (*shape[:-2], 1, shape[-1]))
        for start, shape in zip(starts, ours)
    ]
    (theirs,) = tensor.form.write(numbered)
    first = theirs[0] if len(ours[0]) == 3 else theirs
    places = np.argsort(first.reshape(-1))
    return tuple(tuple(places[start:stop].tolist()) for start, stop in zip(starts, starts[1:]))


def in_stack(decoder: Decoder, module: str, layer: int | None) -> str:
    """The path of a layer's module in the decoder: that of the stack which the layer is a row of."""
    if layer is None:
        return module
    s, position, _ = row_of(decoder, layer)
    return f"segments/{s}/{position}/{module}"


def row_of(decoder: Decoder, layer: int) -> tuple[int, int, int]:
    """Segment, position in its block, and row of a layer."""
    for s, segment in enumerate(decoder.groups):
        for position in range(len(segment.block)):
            rows = segment.layers(position)
            if layer in rows:
                return s, position, rows.index(layer)
    raise ValueError(f"no layer {layer}")


def module_at(decoder: Decoder, path: str) -> Any:
    """The module at a path of the parameters' tree."""
    module: Any = decoder
    for key in path.split("/"):
        module = module[key] if key.isdecimal() else getattr(module, key)
    return module


def kind_of(module: Any) -> Kind | None:
    return next((kind for cls, kind in KINDS if isinstance(module, cls)), None)
