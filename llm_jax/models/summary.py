"""A decoder as a person reads it: parameters by part, and a line for each run of equal layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_jax.base.trees import flatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import abstract_params, declarations

NORMS = "norms"


@dataclass(frozen=True)
class Row:
    """A part of the model, or layers that are alike."""

    where: str
    """`embed`, `layers 0–11`, `further tokens 1–2`, `norm`, `head`."""
    what: tuple[str, ...]
    """Modules, as `attention(q 128→128, k 128→64, …)`."""
    each: int
    """Parameters of one layer, or of the part."""
    layers: int
    """How many layers; 1 for a part that is no layer."""


def parameters_by_part(decoder: Decoder) -> dict[str, int]:
    """Counts for embed, the modules of the layers, norms (all of them) and head, which is 0 where it is tied.

    In a model that ends in scores, their projection is in the head's place.
    """
    counts: dict[str, int] = {}
    for path, leaf in flatten(abstract_params(decoder)).items():
        part = _part(path)
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    head = "head" if decoder.config.head.labels is None else "score"
    inside = [part for part in counts if part not in ("embed", NORMS, head)]
    return {part: counts.get(part, 0) for part in ("embed", *inside, NORMS, head)}


def active_parameters(decoder: Decoder) -> int:
    """Those that take part in one token's next-token logits: of experts as many as a token is sent to, and the shared
    ones; not the layers for further tokens. The embedding is counted whole, as model cards do."""
    declared, experts, count = flatten(declarations(decoder)), decoder.config.experts, 0
    for path, leaf in flatten(abstract_params(decoder)).items():
        if not path.startswith("mtp/"):
            size = math.prod(leaf.shape)
            count += size * experts.top_k // experts.num if "experts" in declared[path].axes else size
    return count


def rows(decoder: Decoder) -> list[Row]:
    """From the embedding to the head."""
    tree = abstract_params(decoder)
    found = [_row(name, {name: tree[name]}, 1) for name in ("embed", "position_embed", "embed_norm") if name in tree]
    for s, segment in enumerate(decoder.groups):
        for position in range(len(segment.block)):
            block = tree["segments"][str(s)][str(position)]
            layers = segment.layers(position)
            found.append(_row(_numbers(layers), block, len(layers), stacked=True))
    # Layers for further tokens are alike.
    if "mtp" in tree:
        count = len(tree["mtp"])
        where = "further token" if count == 1 else f"further tokens 1–{count}"
        found.append(_row(where, tree["mtp"]["0"], count))
    ends = ("norm", "transform", "vocab_bias", "head", "score")
    found += [_row(name, {name: tree[name]}, 1) for name in ends if name in tree]
    if "head" in tree or "score" in tree:
        return found
    return [*found, Row("head", ("the embedding, transposed (tied)",), 0, 1)]


def _part(path: str) -> str:
    inner = path.split("/")
    module = inner[3] if inner[0] == "segments" else inner[0]
    return NORMS if module.endswith("norm") else module


def _row(where: str, modules: Any, layers: int, stacked: bool = False) -> Row:
    what, each = [], 0
    for name, module in modules.items():
        shapes = {path: leaf.shape[stacked:] for path, leaf in flatten(module).items()}
        each += sum(math.prod(shape) for shape in shapes.values())
        inner = ", ".join(_weight(path, shape) for path, shape in shapes.items())
        what.append(f"{name}({inner})" if where != name else inner)
    return Row(where, tuple(what), each, layers)


def _weight(path: str, shape: Sequence[int]) -> str:
    name = path.removesuffix("/weight").replace("/", ".")
    *experts, _, _ = (*shape,) if len(shape) > 2 else (0, 0)
    size = "".join(f"{number} × " for number in experts) + "→".join(f"{length}" for length in shape[len(experts) :])
    return size if name == "weight" else f"{name} {size}"


def _numbers(layers: Sequence[int]) -> str:
    """`layers 0–11`, `layers 0, 2, … 10`, `layer 3`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}–{layers[-1]}"
    if len(layers) <= 3:
        return f"layers {', '.join(map(str, layers))}"
    return f"layers {layers[0]}, {layers[1]}, … {layers[-1]}"
