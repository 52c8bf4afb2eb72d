"""AdamW with groups, by what parameters declare: optax's interface, state as a plain dict."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.training.config import GroupConfig, OptimizerConfig
from llm_jax.training.schedule import Schedule, make_schedule

Tree = Mapping[str, Any]


class Rule(NamedTuple):
    """What applies to one parameter."""

    multiplier: float
    decay: float


class Optimizer(NamedTuple):
    """An optax.GradientTransformation (its first two fields), with what the step and its metrics ask besides."""

    init: Callable[[Tree], dict[str, Any]]
    update: Callable[..., tuple[Tree, dict[str, Any]]]
    schedule: Schedule
    rules: dict[str, Rule]
    """A `Rule` for each parameter by `role/path`; a multiplier of 0 freezes it, and it takes no gradient."""


def global_norm(grads: Tree) -> Array:
    """float32[]: root of the sum of squares over all tensors."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))


def clip_scale(norm: Array, clip_norm: float | None) -> Array:
    """float32[]: factor that takes gradients of this norm to `clip_norm`, as torch.nn.utils.clip_grad_norm_."""
    return jnp.ones_like(norm) if clip_norm is None else jnp.minimum(1.0, clip_norm / (norm + 1e-6))


def make_rules(config: OptimizerConfig, declarations: Tree) -> dict[str, Rule]:
    """A `Rule` for each declared parameter, by `role/path`.

    A group's `match` is searched for (`re.search`) in the path, and in `role/path`; the first group found decides.
    A parameter that does not declare decay never decays; a multiplier of 0 freezes.
    Raises UserError for a pattern that is no regular expression and for a group that decides over nothing.
    """
    patterns = _patterns(config)
    hits = [0] * len(patterns)

    def rule(path: str, declaration: Any) -> Rule:
        multiplier, decay = 1.0, config.weight_decay
        for i, (group, pattern) in enumerate(patterns):
            if pattern.search(path.partition("/")[2]) or pattern.search(path):
                hits[i] += 1
                multiplier = group.learning_rate_multiplier
                decay = config.weight_decay if group.weight_decay is None else group.weight_decay
                break
        return Rule(multiplier, decay if declaration.decay and multiplier else 0.0)

    rules = {path: rule(path, declaration) for path, declaration in flatten(declarations).items()}
    for (group, _), count in zip(patterns, hits):
        if not count:
            raise UserError(f"optimizer group {group.match!r} decides over no parameter")
    return rules


def _patterns(config: OptimizerConfig) -> list[tuple[GroupConfig, re.Pattern[str]]]:
    patterns = []
    for i, group in enumerate(config.groups):
        try:
            patterns.append((group, re.compile(group.match)))
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"optimizer.groups.{i}.match {group.match!r} is no regular expression: {error}") from None
    return patterns


def check_optimizer(config: OptimizerConfig, steps: int) -> None:
    """Raises UserError for fields out of range, or that the chosen schedule would ignore."""
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"optimizer.{name} is {getattr(config, name)}; it must be in [0, 1)")
    numbers = {name: getattr(config, name) for name in ("learning_rate", "eps", "weight_decay")}
    for i, group in enumerate(config.groups):
        numbers[f"groups.{i}.learning_rate_multiplier"] = group.learning_rate_multiplier
        numbers[f"groups.{i}.weight_decay"] = 0.0 if group.weight_decay is None else group.weight_decay
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise UserError(f"optimizer.{name} is {value}; it must be a number of at least 0")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise UserError(f"optimizer.clip_norm is {config.clip_norm}; it must be positive, or None not to clip")
    if config.decay_steps is not None and config.schedule != "wsd":
        raise UserError(
            f"optimizer.decay_steps is set, but optimizer.schedule={config.schedule} ignores it; wsd has it"
        )
    if config.final_fraction and config.schedule == "constant":
        raise UserError(
            f"optimizer.final_fraction is {config.final_fraction}, but optimizer.schedule=constant ignores it"
        )
    _patterns(config)
    make_schedule(config, steps)


def make_optimizer(config: OptimizerConfig, declarations_by_role: Tree, steps: int) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), equal to torch.optim.AdamW.

    `declarations_by_role`: `{role: nested dict of declarations}`, of the trained roles only. State:
    `{"count": int32[], "mu": like the parameters, "nu": likewise}`, moments in float32. `update(grads, state, params)`
    clips by global norm first, as configured; gradients and updates have the trained parameters only.
    Raises UserError as `check_optimizer`, and for groups that match nothing.
    """
    check_optimizer(config, steps)
    schedule, rules = make_schedule(config, steps), make_rules(config, declarations_by_role)

    def init(params: Tree) -> dict[str, Any]:
        def zeros(p: Array) -> Array:
            return jnp.zeros(p.shape, jnp.float32)

        return {"count": jnp.zeros((), jnp.int32), "mu": jax.tree.map(zeros, params), "nu": jax.tree.map(zeros, params)}

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, dict[str, Any]]:
        scale = clip_scale(global_norm(grads), config.clip_norm)
        count = state["count"] + 1
        rate = schedule(state["count"])
        correct1, correct2 = (
            1 - config.beta1 ** count.astype(jnp.float32),
            1 - config.beta2 ** count.astype(jnp.float32),
        )
        updates, mu, nu = {}, flatten(state["mu"]), flatten(state["nu"])
        flat_params = flatten(params)
        for path, gradient in flatten(grads).items():
            rule = rules[path]
            g = gradient.astype(jnp.float32) * scale
            mu[path] = config.beta1 * mu[path] + (1 - config.beta1) * g
            nu[path] = config.beta2 * nu[path] + (1 - config.beta2) * jnp.square(g)
            step = mu[path] / correct1 / (jnp.sqrt(nu[path] / correct2) + config.eps)
            updates[path] = -rate * rule.multiplier * (step + rule.decay * flat_params[path])
        return unflatten(updates), {"count": count, "mu": unflatten(mu), "nu": unflatten(nu)}

    return Optimizer(init, update, schedule, rules)
