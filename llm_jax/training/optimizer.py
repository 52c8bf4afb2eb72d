"""The optimizer of a run: a rule for each parameter by what it declares and by groups, behind optax's interface."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.base.trees import flatten, unflatten
from llm_jax.training.config import OptimizerConfig
from llm_jax.training.groups import Rule, check_optimizer, make_rules
from llm_jax.training.optimizers import SGD, Adafactor, AdamW, Lion, Muon, UpdateRule
from llm_jax.training.schedule import Schedule, make_schedule

Tree = Mapping[str, Any]


class Optimizer(NamedTuple):
    """An optax.GradientTransformation (its first two fields), with what the step and its metrics ask besides."""

    init: Callable[[Tree], dict[str, Any]]
    update: Callable[..., tuple[Tree, dict[str, Any]]]
    schedule: Schedule
    rules: dict[str, Rule]
    """A `Rule` for each parameter by `role/path`; a multiplier of 0 freezes it, and it takes no gradient."""
    others: dict[str, Rule]
    """The same for what is not `learned`: all that counts of it is whether it is frozen."""

    def masked(self, grads: Mapping[str, Array]) -> dict[str, Array]:
        """Gradients by `role/path`, 0 in the layers that are frozen, which so count for nothing in the norm."""
        return {path: _but_frozen(g, self.rules[path], 0.0) for path, g in grads.items()}

    def but_frozen(self, moved: Tree, before: Tree) -> dict[str, Any]:
        """What is not `learned` after a step: frozen layers as they were."""
        flat, old = flatten(moved), flatten(before)
        kept = {path: old[path] if not self.others[path].multiplier else value for path, value in flat.items()}
        return unflatten({path: _but_frozen(x, self.others[path], old[path]) for path, x in kept.items()})


def global_norm(grads: Tree) -> Array:
    """float32[]: root of the sum of squares over all tensors."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))


def clip_scale(norm: Array, clip_norm: float | None) -> Array:
    """float32[]: factor that takes gradients of this norm to `clip_norm`, as torch.nn.utils.clip_grad_norm_."""
    return jnp.ones_like(norm) if clip_norm is None else jnp.minimum(1.0, clip_norm / (norm + 1e-6))


def make_optimizer(
    config: OptimizerConfig,
    declarations_by_role: Tree,
    steps: int,
    *,
    freeze: tuple[str, ...] = (),
    layouts: Mapping[str, Any] | None = None,
) -> Optimizer:
    """The optimizer that a configuration describes.

    `declarations_by_role`: `{role: nested dict of declarations}`, of the trained roles only; what is not `learned` is
    left out. `freeze` and `layouts` as for `make_rules`. State: `{"count": int32[]}` and, by name, what rules keep
    (`mu` and `nu` of AdamW, ...), each a tree of the parameters that have it, float32; nothing for frozen parameters.
    `update(grads, state, params)` clips by global norm first, as configured; gradients and updates have the trained
    parameters only.
    Raises UserError as `check_optimizer` and `make_rules`.
    """
    check_optimizer(config, steps)
    schedule = make_schedule(config, steps)
    declared = flatten(declarations_by_role)
    every = make_rules(config, declarations_by_role, freeze, layouts)
    rules, others = ({p: r for p, r in every.items() if declared[p].learned is learned} for learned in (True, False))
    by_name: dict[str, UpdateRule] = {
        "adamw": AdamW(config.beta1, config.beta2, config.eps),
        "lion": Lion(config.lion),
        "adafactor": Adafactor(config.adafactor),
        "muon": Muon(config.muon),
        "sgd": SGD(config.sgd),
    }

    def init(params: Tree) -> dict[str, Any]:
        slots: dict[str, dict[str, Array]] = {}
        for path, param in flatten(params).items():
            if rules[path].multiplier:
                for name, value in by_name[rules[path].name].init(param.shape, declared[path]).items():
                    slots.setdefault(name, {})[path] = value
        return {"count": jnp.zeros((), jnp.int32), **{name: unflatten(flat) for name, flat in slots.items()}}

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, dict[str, Any]]:
        scale = clip_scale(global_norm(grads), config.clip_norm)
        count = state["count"] + 1
        rate = schedule(state["count"])
        slots = {name: flatten(tree) for name, tree in state.items() if name != "count"}
        shared = {name: by_name[name].shared(count) for name in sorted({rule.name for rule in rules.values()})}
        updates, flat_params = {}, flatten(params)
        for path, gradient in flatten(grads).items():
            rule = rules[path]
            kept = {name: flat[path] for name, flat in slots.items() if path in flat}
            g = gradient.astype(jnp.float32) * scale
            step, kept = by_name[rule.name].direction(g, kept, flat_params[path], declared[path], shared[rule.name])
            step = -rate * rule.multiplier * (step + rule.decay * flat_params[path])
            # Adding -0.0 changes no bit, not even of a -0.0.
            updates[path] = _but_frozen(step, rule, -0.0)
            for name, value in kept.items():
                slots[name][path] = value
        return unflatten(updates), {"count": count, **{name: unflatten(flat) for name, flat in slots.items()}}

    return Optimizer(init, update, schedule, rules, others)


def _but_frozen(x: Array, rule: Rule, value: float | Array) -> Array:
    """`value` in the frozen layers of a stacked array."""
    if rule.frozen is None:
        return x
    frozen = jnp.array(rule.frozen).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(frozen, value, x)
