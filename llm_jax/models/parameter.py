"""What every parameter says about itself, and the bridge between modules and plain trees of arrays.

Optimizers, decay masks, shardings and per-tensor norms read a parameter's `Declaration` and never its `ndim`:
a stacked norm `[L, D]` looks like a matrix and is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten

LAYERS = "layers"


@dataclass(frozen=True)
class Init:
    """How a parameter starts: `normal` with mean 0 and standard deviation `std`; a constant; `log_arange`, log 1,
    log 2, … along its last axis; `step_bias`, numbers whose softplus is log-uniform."""

    kind: Literal["normal", "zeros", "ones", "log_arange", "step_bias"]
    std: float = 0.0
    steps: tuple[float, float, float] | None = None
    """Of a `step_bias`: the range of its softplus, and the least that it may be."""


@dataclass(frozen=True)
class Declaration:
    axes: tuple[str, ...]
    """Logical name of each axis; `layers` first where the parameter is stacked."""
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Axes that form the rows (input side) and the columns (output side) of its matrix; None for vectors."""
    decay: bool
    """Whether weight decay applies."""
    init: Init
    learned: bool = True
    """Whether gradients move it. Otherwise a rule of its own does, and it lies in the train state's `model_state`."""
    per_row: bool = False
    """Whether it may be bound with further axes: a value for each row of a batch in place of one for all."""

    def stacked(self) -> Declaration:
        """The same parameter with a leading layers axis."""
        matrix = self.matrix and (tuple(i + 1 for i in self.matrix[0]), tuple(i + 1 for i in self.matrix[1]))
        return replace(self, axes=(LAYERS, *self.axes), matrix=matrix)


def parameter(shape: tuple[int, ...], declaration: Declaration) -> nnx.Param:
    """A parameter without a value yet: shape, float32, and its declaration."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), decl=declaration)


def matrix(rows: int, columns: int, axes: tuple[str, str], std: float) -> nnx.Param:
    """Weight `[rows, columns]`, normal init, decayed."""
    return parameter((rows, columns), Declaration(axes, ((0,), (1,)), True, Init("normal", std)))


def vector(size: int, axis: str, kind: Literal["zeros", "ones"]) -> nnx.Param:
    """Bias or norm weight `[size]`, constant init, not decayed."""
    return parameter((size,), Declaration((axis,), None, False, Init(kind)))


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}


def to_tree(module: nnx.Module) -> dict[str, Any]:
    """The module's values as a nested dict with string keys: arrays, or ShapeDtypeStructs of an abstract module."""
    return unflatten({path: variable.get_value() for path, variable in _variables(module).items()})


def declarations(module: nnx.Module) -> dict[str, Any]:
    """A `Declaration` for each leaf of `to_tree`."""
    return unflatten({path: variable.get_metadata("decl") for path, variable in _variables(module).items()})


def abstract_params(module: nnx.Module) -> dict[str, Any]:
    """A float32 `ShapeDtypeStruct` for each parameter of an abstract module."""
    return to_tree(module)


def bind[M: nnx.Module](module: M, params: Mapping[str, Any]) -> M:
    """The module with the arrays of `params` in it (inside jit: traced ones). The module given is left as it is.

    Raises UserError where a path is missing, unknown, or of another shape.
    """
    flat = flatten(params)
    graph, state = nnx.split(module)
    variables = nnx.to_flat_state(state)
    wanted = {"/".join(map(str, path)): variable.get_value().shape for path, variable in variables}
    free = {"/".join(map(str, path)) for path, variable in variables if variable.get_metadata("decl").per_row}
    for path in [*sorted(wanted.keys() - flat.keys()), *sorted(flat.keys() - wanted.keys())]:
        raise UserError(f"parameter {path} is {'missing' if path in wanted else 'not one of the model'}")
    for path, shape in wanted.items():
        if flat[path].shape != shape and path not in free:
            raise UserError(f"parameter {path} has shape {flat[path].shape}, the model needs {shape}")
    bound = [(path, variable.replace(flat["/".join(map(str, path))])) for path, variable in variables]
    return nnx.merge(graph, nnx.from_flat_state(bound))


def map_values[M: nnx.Module](module: M, f: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]) -> M:
    """The module with `f(values, declarations)` in place of its values, shapes free to differ."""
    graph, state = nnx.split(module)
    variables = nnx.to_flat_state(state)
    flat = flatten(f(to_tree(module), declarations(module)))
    return nnx.merge(
        graph, nnx.from_flat_state([(path, v.replace(flat["/".join(map(str, path))])) for path, v in variables])
    )


def stack[M: nnx.Module](module: M, repeats: int) -> M:
    """An abstract module whose parameters have a leading layers axis of size `repeats`."""
    graph, state = nnx.split(module)

    def stacked(variable: nnx.Variable) -> nnx.Param:
        value = variable.get_value()
        return parameter((repeats, *value.shape), variable.get_metadata("decl").stacked())

    return nnx.merge(graph, nnx.from_flat_state([(path, stacked(v)) for path, v in nnx.to_flat_state(state)]))
