"""A loss's own first pass beside the routers': both are declared as one, and each gets its own part back."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from llm_jax.training.terms import Params, Rows, Statistics

Pass = Callable[[Params, Params, Rows, Array], Any]


def with_first_pass(of_extra: dict[str, Any], own: Pass | None, of_one: bool = False) -> dict[str, Any]:
    """Keyword arguments of `Objective`: those of `Regularization.of_objective`, with a loss's first pass in them.

    `of_one`: whether a batch of a single microbatch needs it too (`Objective.statistics_of_one`).
    """
    if own is None:
        return of_extra
    routers: Pass | None = of_extra.get("batch_statistics")

    def both(params: Params, frozen: Params, rows: Rows, key: Array) -> dict[str, Any]:
        found = {"loss": own(params, frozen, rows, key)}
        return found if routers is None else found | {"routers": routers(params, frozen, rows, key)}

    return {**of_extra, "batch_statistics": both, "statistics_of_one": of_one}


def split_statistics(statistics: Statistics | None, own: bool) -> tuple[Statistics | None, Statistics | None]:
    """The loss's part and the routers', of what `with_first_pass` declared; None where there is none."""
    if statistics is None or not own:
        return None, statistics
    of_loss, of_routers = statistics.values["loss"], statistics.values.get("routers")
    routers = None if of_routers is None else Statistics(of_routers, statistics.index)
    return Statistics(of_loss, statistics.index), routers


def own_rows(values: Any, index: Array, count: int) -> Any:
    """Of leaves [k * n, ...], one for each row of the batch, those of microbatch `index` of `count` rows."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * count, count), values)
