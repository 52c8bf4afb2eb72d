"""One training step: gather, microbatches, clip, update. The only place that knows what each ZeRO stage does when.

    stage   masters, moments   weights in compute dtype             gradients (float32)
    0       replicated         one copy, made at the start          whole
    1       cut over data      one copy, gathered at the start      whole
    2       cut over data      one copy, gathered at the start      cut: scattered block by block
    3       cut over data      gathered block by block              cut: scattered block by block

Gradients of several microbatches are added up in place, inside of the backward pass, by handing jax's transposition
the references to add into: a gradient of one microbatch never exists as a whole.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.base import processes
from llm_jax.base.trees import flatten, unflatten
from llm_jax.sharding.context import constrain, constrain_spec, use
from llm_jax.sharding.plan import Plan
from llm_jax.sharding.weights import Gathered, gather_all
from llm_jax.training.model_state import join
from llm_jax.training.optimizer import Optimizer, global_norm
from llm_jax.training.state import State, state_shardings, weights_in_use
from llm_jax.training.terms import (
    Objective,
    Pairs,
    Params,
    Rows,
    Statistics,
    add_pairs,
    divide_pairs,
    loss_pairs,
    total_loss,
)

STEP_PURPOSE = 1
"""Folded into the seed's key, so that randomness of steps differs from that of init and of data."""


class Program:
    """A jitted function of a plan, compiled at the first call for the shapes it sees."""

    def __init__(self, plan: Plan, jit: Callable[..., Any]):
        self._plan = plan
        self._jit = jit
        self._compiled: Any = None

    def _jitted(self, args: tuple[Any, ...]) -> Any:
        if self._compiled is None:
            self._compiled = self._jit(*args)
        return self._compiled

    def __call__(self, *args: Any) -> Any:
        begun = self._compiled is not None
        with use(self._plan):
            run = self._jitted(args)
            if processes.several() and not begun:
                # Who starts a collective waits 30 s for the others under gloo: nobody does before all have compiled.
                run.lower(*args).compile()
                processes.barrier()
            return run(*args)

    def lower(self, *args: Any) -> Any:
        """As `jax.jit(f).lower`: takes ShapeDtypeStructs too, and devices that are only described."""
        with use(self._plan):
            return self._jitted(args).lower(*args)


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    plan: Plan,
    declarations: Mapping[str, Any],
    *,
    seed: int = 0,
    ema_decay: float | None = None,
) -> Program:
    """`(state, batch) -> (state, metrics)`, jitted; donates the state.

    `declarations`: by role, trained and frozen. `batch`: arrays [k, n, ...], k microbatches of n rows, rows cut over
    `data`. Metrics (float32[]): the objective's, `loss`, `loss/<term>` where there are several, `grad_norm` before
    clipping, `learning_rate`, and `finite` (bool[]); those of `objective.sparse` are float32[2]. Where loss or norm are
    not finite the returned state is the one given, unchanged: what was good before stays good. `ema_decay` is of the
    state's `ema`, where it has one: `ema = decay ema + (1 - decay) params`, after each step.
    """
    trained = [path for path, rule in optimizer.rules.items() if rule.multiplier]

    def step(state: State, batch: Rows) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STEP_PURPOSE), state["step"])
        batch = _numbered(batch) if objective.random else batch
        params = join(state["params"], state["model_state"])
        grads, pairs = gradients(objective, plan, declarations, params, state["frozen"], batch, key, trained=trained)
        axes = {path: flatten(declarations)[path].axes for path in trained}
        grads = {path: constrain_spec(g, plan.storage_spec(axes[path], g.shape)) for path, g in grads.items()}
        grads = optimizer.masked(grads)
        norm = global_norm(grads)
        updates, opt_state = optimizer.update(unflatten(grads), state["opt_state"], state["params"])
        flat = flatten(state["params"])
        params = unflatten(flat | {path: flat[path] + update for path, update in flatten(updates).items()})
        metrics = _values(objective, pairs)
        metrics |= {name: jnp.stack(pairs[name]) for name in objective.sparse}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = {**state, "step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if objective.moved is not None:
            moved = objective.moved(state["model_state"], pairs)
            new["model_state"] = optimizer.but_frozen(moved, state["model_state"])
        if objective.synced is not None:
            trained_now = join(params, new["model_state"])
            new["frozen"] = objective.synced(state["frozen"], trained_now, new["step"])
        if ema_decay is not None:
            share = 1 - ema_decay
            new["ema"] = jax.tree.map(lambda e, p: e + share * (p - e), state["ema"], params)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": optimizer.schedule(state["opt_state"]["count"]),
            "finite": finite,
        }
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), metrics

    def jit(state: State, batch: Rows) -> Any:
        shardings = state_shardings(state, declarations, plan)
        return jax.jit(step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None))

    return Program(plan, jit)


def make_grads(objective: Objective, plan: Plan, declarations: Mapping[str, Any]) -> Program:
    """`(params, frozen, batch) -> (loss, metrics, gradients)`: the step's first half; gradients float32, by role."""

    def run(params: Params, frozen: Params, batch: Rows) -> tuple[Array, dict[str, Array], dict[str, Any]]:
        grads, pairs = gradients(objective, plan, declarations, params, frozen, batch, jax.random.key(0))
        metrics = _values(objective, pairs)
        return metrics.pop("loss"), metrics, unflatten(grads)

    return Program(plan, lambda *_: jax.jit(run))


def make_eval_step(objective: Objective, plan: Plan, declarations: Mapping[str, Any]) -> Program:
    """`(state, batch) -> pairs`: terms (`loss/<term>`) and metrics of a batch as (sum, weight), to be added up over
    batches (`add_pairs`) and divided once (`divide_pairs`); see `evaluate`. Of the moving average, where there is one.
    """

    def run(state: State, batch: Rows) -> Pairs:
        axes = jax.tree.map(lambda d: d.axes, dict(declarations))
        params, frozen = weights_in_use(state), state["frozen"]
        if plan.zero < 3:
            params, frozen = _gather(params, axes), _gather(frozen, axes)
        weights = objective.weights(batch)

        def one(rows: Rows, statistics: Any) -> Pairs:
            sums, metrics = objective.terms(params, frozen, rows, statistics, jax.random.key(0))
            return {**loss_pairs(sums, weights), **metrics}

        pairs = _over_microbatches(one, batch, _statistics(objective, params, frozen, batch, jax.random.key(0)))
        return _added(pairs, weights, objective.extremes)

    return Program(plan, lambda *_: jax.jit(run))


def evaluate(eval_step: Callable[[State, Rows], Pairs], objective: Objective, state: State, batches: Iterable[Rows]):
    """Metrics over several batches, each a ratio of sums over all of them; floats, without the `eval_` prefix."""
    pairs: Pairs | None = None
    for batch in batches:
        pairs = add_pairs(pairs, jax.device_get(eval_step(state, batch)), objective.extremes)
    # Where the evaluated batches hold nothing of a sparse metric, it has no value.
    pairs = {n: pair for n, pair in (pairs or {}).items() if n not in objective.sparse or pair[1] > 0}
    values = _values(objective, pairs)
    return {name: float(value) for name, value in values.items()}


def gradients(
    objective: Objective,
    plan: Plan,
    declarations: Mapping[str, Any],
    params: Params,
    frozen: Params,
    batch: Rows,
    key: Array,
    *,
    trained: Iterable[str] | None = None,
) -> tuple[dict[str, Array], Pairs]:
    """Gradients by `role/path`, float32, as the stage accumulates them, and the batch's metrics as (sum, weight).

    `trained`: the parameters that take a gradient; None means all. To be called inside jit, with the plan in force.
    """
    axes = jax.tree.map(lambda d: d.axes, dict(declarations))
    if plan.zero < 3:
        params, frozen = _gather(params, axes), _gather(frozen, axes)
    flat_params, flat_axes = flatten(params), flatten(axes)
    paths = list(flat_params if trained is None else trained)

    def cut(grads: dict[str, Array]) -> dict[str, Array]:
        return {path: constrain_spec(g, plan.gradient_spec(flat_axes[path], g.shape)) for path, g in grads.items()}

    zeros = cut({path: jnp.zeros(flat_params[path].shape, jnp.float32) for path in paths})
    # Where there is one gathered copy, in compute dtype, the gradient is taken by float32 slots beside it.
    at = zeros if plan.zero < 3 else {path: flat_params[path] for path in paths}

    def bound(at: dict[str, Array]) -> dict[str, Any]:
        if plan.zero < 3:
            return unflatten(flat_params | {path: Gathered(flat_params[path], slot) for path, slot in at.items()})
        return unflatten(flat_params | at)

    weights = objective.weights(batch)
    statistics = _statistics(objective, params, frozen, batch, key)

    def loss(at: dict[str, Array], rows: Rows, statistics: Any) -> tuple[Array, Pairs]:
        sums, metrics = objective.terms(bound(at), frozen, rows, statistics, key)
        return total_loss(objective, sums, weights), {**loss_pairs(sums, weights), **metrics}

    if _count(batch) == 1:
        (_, pairs), grads = jax.value_and_grad(loss, has_aux=True)(at, *_only(batch, statistics))
        return cut(grads), _added(jax.tree.map(lambda x: x[None], pairs), weights, objective.extremes)

    references = jax.tree.map(jax.new_ref, zeros)

    def accumulate(rows: Rows, statistics: Any) -> Pairs:
        value, backward, pairs = jax.vjp(lambda at: loss(at, rows, statistics), at, has_aux=True)
        backward.with_refs(references)(jnp.ones_like(value))
        return pairs

    pairs = _over_microbatches(accumulate, batch, statistics)
    return cut(jax.tree.map(jax.freeze, references)), _added(pairs, weights, objective.extremes)


def _gather(by_role: Params, axes: Mapping[str, Any]) -> dict[str, Any]:
    return {role: gather_all(tree, axes[role]) for role, tree in by_role.items()}


def _count(batch: Rows) -> int:
    return jax.tree.leaves(dict(batch))[0].shape[0]


def _numbered(batch: Rows) -> Rows:
    """With `example` int32[k, n]: the place of each row in the global batch, whatever k is."""
    k, n = jax.tree.leaves(dict(batch))[0].shape[:2]
    return {**batch, "example": jnp.arange(k * n, dtype=jnp.int32).reshape(k, n)}


def _rows(batch: Rows) -> dict[str, Array]:
    """A microbatch, rows cut over `data`."""
    return jax.tree.map(lambda x: constrain(x, ("batch",) + (None,) * (x.ndim - 1)), dict(batch))


def _only(batch: Rows, statistics: Any) -> tuple[Rows, Any]:
    own = None if statistics is None else Statistics(statistics, jnp.int32(0))
    return _rows({name: x[0] for name, x in batch.items()}), own


def _over_microbatches(f: Callable[[Rows, Any], Any], batch: Rows, statistics: Any) -> Any:
    """`f(rows, statistics)` of each microbatch in order, results stacked [k, ...]; no loop where k is 1."""
    if _count(batch) == 1:
        return jax.tree.map(lambda x: x[None], f(*_only(batch, statistics)))

    def body(_: None, xs: tuple[Array, Rows]) -> tuple[None, Any]:
        index, rows = xs
        return None, f(_rows(rows), None if statistics is None else Statistics(statistics, index))

    return jax.lax.scan(body, None, (jnp.arange(_count(batch), dtype=jnp.int32), dict(batch)))[1]


def _statistics(objective: Objective, params: Params, frozen: Params, batch: Rows, key: Array) -> Any:
    """The first pass: leaves [k, ...], without gradient; None where the objective declares none, or needs none."""
    if objective.batch_statistics is None or (_count(batch) == 1 and not objective.statistics_of_one):
        return None
    compute = objective.batch_statistics
    return jax.lax.stop_gradient(_over_microbatches(lambda rows, _: compute(params, frozen, rows, key), batch, None))


def _values(objective: Objective, pairs: Pairs) -> dict[str, Array]:
    """What is reported of a whole batch or evaluation."""
    reported = pairs if objective.summary is None else objective.summary(pairs)
    return divide_pairs(reported, objective.coefficients)


def _added(pairs: Pairs, weights: Mapping[str, Array], extremes: Mapping[str, str]) -> Pairs:
    """Sums (or `extremes`) over microbatches of stacked pairs; a term's weight is already the whole batch's."""
    out = {name: (getattr(x, extremes.get(name, "sum"))(0), weight.sum(0)) for name, (x, weight) in pairs.items()}
    return out | {f"loss/{name}": (out[f"loss/{name}"][0], jnp.float32(w)) for name, w in weights.items()}
