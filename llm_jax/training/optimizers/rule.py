"""What every update rule is, and which axes of a parameter it works on.

A stacked parameter `[L, ...]` is L parameters: what a rule reduces (a norm, a row's mean) it reduces within a layer.
Rules read a parameter's declaration for that and never its `ndim`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from jaxtyping import Array, Float

from llm_jax.models.parameter import LAYERS

Slots = dict[str, Array]
"""What a rule keeps of one parameter, by name: arrays of its shape, or of some of its axes (`slot_axes`)."""
ROWS, COLUMNS = "nu_rows", "nu_columns"
"""Names of slots without the columns, and without the rows, of the declared matrix."""


class UpdateRule(Protocol):
    """A rule, by parameter. Learning rate and decoupled decay are the caller's: `p -= rate (direction + decay p)`."""

    def init(self, shape: tuple[int, ...], declaration: Any) -> Slots:
        """Slots before the first step, float32."""
        ...

    def shared(self, count: Array) -> Any:
        """What all parameters share in a step: functions of `count`, int32[], 1 at the first step."""
        ...

    def direction(
        self, gradient: Float[Array, "..."], slots: Mapping[str, Array], param: Array, declaration: Any, shared: Any
    ) -> tuple[Float[Array, "..."], Slots]:
        """The step for a learning rate of 1, before its sign is turned, and the slots after it.

        `gradient` is float32 and clipped.
        """
        ...


def batch_axes(declaration: Any) -> tuple[int, ...]:
    """Axes along which there are several matrices (layers, experts); of a parameter without a matrix, its layers."""
    if declaration.matrix is None:
        return (0,) if declaration.axes[0] == LAYERS else ()
    rows, columns = declaration.matrix
    return tuple(i for i in range(len(declaration.axes)) if i not in (*rows, *columns))


def own_axes(declaration: Any) -> tuple[int, ...]:
    """The other axes: those of a single matrix or vector."""
    return tuple(i for i in range(len(declaration.axes)) if i not in batch_axes(declaration))


def kept_axes(slot: str, declaration: Any) -> tuple[int, ...]:
    """Which axes of the parameter a slot has, in order."""
    every = range(len(declaration.axes))
    if slot not in (ROWS, COLUMNS):
        return tuple(every)
    rows, columns = declaration.matrix
    dropped = columns if slot == ROWS else rows
    return tuple(i for i in every if i not in dropped)


def slot_axes(slot: str, declaration: Any) -> tuple[str, ...]:
    """Logical axis names of a slot: it lies on the mesh as a parameter with these axes would."""
    return tuple(declaration.axes[i] for i in kept_axes(slot, declaration))
