"""Families whose files hold the experts of a layer in a few tensors, all at once and inputs first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llm_jax.models.config import ModelConfig
from llm_jax.models.families.experts import WithExperts
from llm_jax.models.families.tensors import Shape, Tensor


@dataclass(frozen=True)
class Together:
    """One tensor for parameters of equal shapes [E, ..., outputs]: their outputs after each other, or in turn."""

    in_turn: bool

    def shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        """Shapes of theirs."""
        return [(*ours[0][:-1], ours[0][-1] * len(ours))]

    def read(self, theirs: Sequence[np.ndarray], ours: Sequence[Shape]) -> list[np.ndarray]:
        """Arrays of the shapes `ours`."""
        (array,), parts = theirs, len(ours)
        if self.in_turn:
            return [array[..., part::parts] for part in range(parts)]
        return np.split(array, parts, axis=-1)

    def write(self, ours: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The other way."""
        if self.in_turn:
            return [np.stack(ours, axis=-1).reshape(self.shapes([array.shape for array in ours])[0])]
        return [np.concatenate(ours, axis=-1)]


class WithFusedExperts(WithExperts):
    """`ALL` names the tensors of a file; biases are in ones of their own, whose names end in `_bias`."""

    EACH = {}
    IN_TURN: ClassVar[bool]
    """Whether columns of a tensor belong to its parts in turn."""

    def _named(
        self, declared: Mapping[str, Any], table: Mapping[str, str], prefix: str, layer: int | None, config: ModelConfig
    ) -> list[Tensor]:
        rest = {path: declaration for path, declaration in declared.items() if "experts" not in declaration.axes}
        found = super()._named(rest, table, prefix, layer, config)
        for name, parts in self.ALL.items():
            for leaf, ending in (("weight", ""), ("bias", "_bias")):
                paths = tuple(f"{part}/{leaf}" for part in parts)
                if paths[0] in declared.keys() - rest.keys():
                    found.append(Tensor((f"{prefix}{name}{ending}",), paths, layer, Together(self.IN_TURN)))
        return found
