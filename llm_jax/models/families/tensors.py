"""How tensors of a folder and parameters of ours hold the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Holding(Protocol):
    """How tensors of theirs hold parameters of ours."""

    def shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        """Shapes of theirs."""
        ...

    def read(self, theirs: Sequence[np.ndarray], ours: Sequence[Shape]) -> list[np.ndarray]:
        """Arrays of the shapes `ours`."""
        ...

    def write(self, ours: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The other way."""
        ...


@dataclass(frozen=True)
class Form:
    """One tensor of theirs that holds one or more of ours.

    Theirs is [outputs, inputs] where `transposed`, and ours side by side along the outputs: whole ones after each
    other, or `groups` times the parts of a group.
    """

    transposed: bool
    groups: int = 1

    def shapes(self, ours: Sequence[Shape]) -> list[Shape]:
        """Shapes of theirs."""
        outputs = sum(shape[-1] for shape in ours)
        whole = (*ours[0][:-1], outputs)
        return [whole[::-1] if self.transposed else whole]

    def read(self, theirs: Sequence[np.ndarray], ours: Sequence[Shape]) -> list[np.ndarray]:
        """Arrays of the shapes `ours`."""
        (array,) = theirs
        if len(ours) == 1:
            return [array.T if self.transposed else array]
        array = array if self.transposed else array.T
        sizes = [shape[-1] // self.groups for shape in ours]
        grouped = array.reshape(self.groups, sum(sizes), *array.shape[1:])
        parts = np.split(grouped, np.cumsum(sizes)[:-1], axis=1)
        return [part.reshape(-1, *array.shape[1:]).T for part in parts]

    def write(self, ours: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The other way."""
        if len(ours) == 1:
            return [ours[0].T if self.transposed else ours[0]]
        turned = [array.T for array in ours]
        grouped = [array.reshape(self.groups, -1, *array.shape[1:]) for array in turned]
        whole = np.concatenate(grouped, axis=1)
        whole = whole.reshape(-1, *whole.shape[2:])
        return [whole if self.transposed else whole.T]


@dataclass(frozen=True)
class Tensor:
    """Tensors `names` of a folder that hold the parameters `paths` of ours."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    """Within the layer where there is one."""
    layer: int | None
    form: Holding
