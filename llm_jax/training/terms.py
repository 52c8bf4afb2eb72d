"""What a job hands the step: named terms, their weights, and metrics, all as sums that add up over microbatches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = Mapping[str, Any]
Rows = Mapping[str, Array]
Pairs = dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Objective:
    """A loss as sums over rows: the gradient is that of `sum over names of coefficient * sum / weight`.

    Weights come from the masks of the whole global batch, before any microbatch is computed, so that k microbatches
    of n rows give the loss and the gradient of one batch of k*n.
    """

    terms: Callable[[Params, Params, Rows, Any, Array], tuple[dict[str, Array], Pairs]]
    """`(params by role, frozen by role, microbatch of arrays [n, ...], statistics, key)` -> sums by name (float32[],
    differentiated), and metrics `{name: (sum, weight)}`; a weight of 0 marks a count, which is summed and not divided.
    """
    weights: Callable[[Rows], dict[str, Array]]
    """`batch of arrays [k, n, ...]` -> float32[] by name; a term of weight 0 counts as 0."""
    coefficients: Mapping[str, float] = field(default_factory=dict)
    """Factor of each term; 1 where it has none."""
    batch_statistics: Callable[[Params, Params, Rows, Array], Any] | None = None
    """`(params, frozen, microbatch, key)` -> pytree, computed without gradient for all microbatches in a first pass;
    terms then receive `Statistics`. None: no pass, and terms receive None."""
    statistics_of_one: bool = True
    """Whether a batch of a single microbatch needs that pass too; otherwise its terms receive None."""
    summary: Callable[[Pairs], Pairs] | None = None
    """From the whole batch's metrics, or those of an evaluation, to the ones that are reported: for what is no ratio of
    two sums. Terms may hand out arrays for it."""
    moved: Callable[[Params, Pairs], dict[str, Any]] | None = None
    """`(model_state, metrics of the whole batch before summary)` -> the model state after the step. None: it stays."""
    synced: Callable[[Params, Params, Array], Params] | None = None
    """`(frozen by role, trained by role after the step, int32[] steps done)` -> frozen by role: for a reference that
    follows the policy. None: it stays."""
    random: bool = False
    """Whether terms draw random numbers in training: rows then have `example`, int32[n], each one's place in the global
    batch. With it and the step's key the numbers are the same on any mesh and for any microbatches."""
    sparse: tuple[str, ...] = ()
    """Metrics of which a single batch may hold nothing: a step hands them on as float32[2], (sum, weight), and they are
    divided once over all steps of a logged interval."""
    extremes: Mapping[str, Literal["min", "max"]] = field(default_factory=dict)
    """Metrics that are not added up over microbatches and batches: of them the least or the largest is kept. Their
    weight is 0."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """What `batch_statistics` returned for all microbatches, leaves [k, ...], and which one is being computed."""

    values: Any
    index: Array
    """int32[]: the microbatch whose own statistics are `values[index]`."""

    @property
    def everything(self) -> Any:
        """Leaves [k * n, ...]: per-row statistics of the whole batch."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self.values)


def per_unit(weight: Array) -> Array:
    """1 / weight, and 0 for a batch in which a term has nothing to count."""
    return jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)


def total_loss(objective: Objective, sums: Mapping[str, Array], weights: Mapping[str, Array]) -> Array:
    """float32[]: the terms' sums by their coefficients and weights. Raises ValueError where the names differ."""
    if sums.keys() != weights.keys():
        raise ValueError(f"terms {sorted(sums)} and weights {sorted(weights)} differ")
    parts = [objective.coefficients.get(n, 1.0) * s.astype(jnp.float32) * per_unit(weights[n]) for n, s in sums.items()]
    return jnp.sum(jnp.stack(parts)) if len(parts) > 1 else parts[0]


def loss_pairs(sums: Mapping[str, Array], weights: Mapping[str, Array]) -> Pairs:
    """The terms as metrics: `loss/<term>`, (sum, weight)."""
    return {f"loss/{name}": (jnp.float32(sums[name]), jnp.float32(weights[name])) for name in sums}


def add_pairs(a: Pairs | None, b: Pairs, extremes: Mapping[str, Literal["min", "max"]]) -> Pairs:
    """Sums of sums and of weights, name by name, and the `extremes` of others; on arrays of any kind, traced or not."""
    if a is None:
        return b
    found = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name not in extremes}
    choose = {"min": jnp.minimum, "max": jnp.maximum}
    return found | {name: (choose[which](a[name][0], b[name][0]), b[name][1]) for name, which in extremes.items()}


def divide_pairs(pairs: Pairs, coefficients: Mapping[str, float]) -> dict[str, Array]:
    """Values of metrics; `loss` put together from the `loss/<term>` pairs, which stay only if they are several."""
    values = {name: total * per_unit(w) + jnp.where(w > 0, 0.0, total) for name, (total, w) in pairs.items()}
    terms = {name: pairs[name][0] * per_unit(pairs[name][1]) for name in pairs if name.startswith("loss/")}
    loss = sum(coefficients.get(name.removeprefix("loss/"), 1.0) * value for name, value in terms.items())
    kept = {name: value for name, value in values.items() if name not in terms}
    return {"loss": jnp.float32(loss), **(terms if len(terms) > 1 else {}), **kept}
