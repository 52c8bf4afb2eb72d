"""Which rule, learning rate and decay each parameter has: groups by pattern, frozen layers, and checks of both."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_value
from llm_jax.base.nearest import nearest
from llm_jax.base.trees import flatten
from llm_jax.training.config import OptimizerConfig
from llm_jax.training.optimizers.muon import is_for_muon
from llm_jax.training.schedule import make_schedule

Tree = Mapping[str, Any]


class Rule(NamedTuple):
    """What applies to one parameter."""

    multiplier: float
    decay: float
    name: str = "adamw"
    """Of the update rule."""
    frozen: tuple[bool, ...] | None = None
    """Of a stacked parameter with frozen layers: which rows they are. None: no row is."""


def make_rules(
    config: OptimizerConfig,
    declarations: Tree,
    freeze: tuple[str, ...] = (),
    layouts: Mapping[str, Any] | None = None,
) -> dict[str, Rule]:
    """A `Rule` for each declared parameter, by `role/path`.

    A group's `match` is searched for (`re.search`) in the path, and in `role/path`; the first group found decides.
    A parameter that does not declare decay never decays; a multiplier of 0 freezes. Where the rule is muon, what is no
    matrix between layers has adamw. `freeze`: patterns searched for in the names of `layer_names`, of which `layouts`
    (by role, `models.layout`) has the numbers; a parameter frozen in all layers has a multiplier of 0.
    Raises UserError for a pattern that is no regular expression, for a group that decides over nothing or asks muon for
    no matrix, for a pattern that freezes nothing, and where nothing is left to train.
    """
    patterns = [(group, _compiled(group.match, f"optimizer.groups.{i}.match")) for i, group in enumerate(config.groups)]
    hits: list[list[str]] = [[] for _ in patterns]
    declared = flatten(declarations)

    def rule(path: str, declaration: Any) -> Rule:
        multiplier, decay, name = 1.0, config.weight_decay, config.rule
        for i, (group, pattern) in enumerate(patterns):
            if pattern.search(path.partition("/")[2]) or pattern.search(path):
                hits[i].append(path)
                multiplier = group.learning_rate_multiplier
                decay = config.weight_decay if group.weight_decay is None else group.weight_decay
                name = group.rule or config.rule
                break
        if name == "muon" and not is_for_muon(declaration):
            name = "adamw"
        return Rule(multiplier, decay if declaration.decay and multiplier else 0.0, name)

    rules = {path: rule(path, declaration) for path, declaration in declared.items()}
    for (group, _), paths in zip(patterns, hits):
        if not paths:
            raise UserError(f"optimizer group {group.match!r} decides over no parameter")
        if group.rule == "muon" and not any(is_for_muon(declared[path]) for path in paths):
            raise UserError(f"optimizer group {group.match!r} has rule=muon, but no matrix between layers in it")
    if not freeze:
        return rules
    rules = _frozen(rules, freeze, {path: layer_names(path, layouts) for path in rules})
    if not any(rule.multiplier for path, rule in rules.items() if declared[path].learned):
        raise UserError(f"train.freeze {list(freeze)} leaves no parameter to train")
    return rules


def layer_names(path: str, layouts: Mapping[str, Any] | None) -> list[str]:
    """`role/segments/0/1/attention/q/weight` as `layers.1.attention.q.weight`, ... for each of its rows; other
    parameters as `embed.weight`."""
    role, _, inner = path.partition("/")
    if not inner.startswith("segments/"):
        return [inner.replace("/", ".")]
    _, segment, position, name = inner.split("/", 3)
    if layouts is None or role not in layouts:
        raise ValueError(f"freeze needs the layout of role {role!r}")
    rows = layouts[role]["segments"][int(segment)][int(position)]
    return [f"layers.{layer}.{name.replace('/', '.')}" for layer in rows]


def _frozen(rules: dict[str, Rule], freeze: Iterable[str], names: Mapping[str, list[str]]) -> dict[str, Rule]:
    patterns = [_compiled(text, f"train.freeze.{i}") for i, text in enumerate(freeze)]
    every = [name for rows in names.values() for name in rows]
    for pattern in patterns:
        if not any(map(pattern.search, every)):
            near = _nearest_part(re.sub(r"[\\^$]", "", pattern.pattern), every)
            hint = f"the nearest is {near}" if near else f"a name is {every[0]}"
            raise UserError(f"train.freeze {pattern.pattern!r} matches no parameter; {hint}")
    out = {}
    for path, rule in rules.items():
        rows = tuple(any(pattern.search(name) for pattern in patterns) for name in names[path])
        if all(rows):
            rule = rule._replace(multiplier=0.0, decay=0.0)
        elif any(rows):
            rule = rule._replace(frozen=rows)
        out[path] = rule
    return out


def _nearest_part(text: str, names: Iterable[str]) -> str | None:
    """The part of a name, of as many words as `text`, that is most like it: a pattern need not match all of a name."""
    size = text.count(".") + 1
    words = [name.split(".") for name in names]
    return nearest(text, dict.fromkeys(".".join(w[i : i + size]) for w in words for i in range(len(w) - size + 1)))


def _compiled(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{where} {text!r} is no regular expression: {error}") from None


def check_optimizer(config: OptimizerConfig, steps: int) -> None:
    """Raises UserError for fields out of range, and for those that the chosen rules or schedule would ignore."""
    for name in ("beta1", "beta2", "lion.beta1", "lion.beta2", "muon.momentum", "sgd.momentum"):
        if not 0 <= field_value(config, name) < 1:
            raise UserError(f"optimizer.{name} is {field_value(config, name)}; it must be in [0, 1)")
    names = ("learning_rate", "eps", "weight_decay", "adafactor.eps", "adafactor.min_scale")
    numbers = {name: field_value(config, name) for name in names}
    for i, group in enumerate(config.groups):
        numbers[f"groups.{i}.learning_rate_multiplier"] = group.learning_rate_multiplier
        numbers[f"groups.{i}.weight_decay"] = 0.0 if group.weight_decay is None else group.weight_decay
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise UserError(f"optimizer.{name} is {value}; it must be a number of at least 0")
    for name in ("adafactor.decay_rate", "adafactor.clip_threshold", "muon.ns_steps"):
        if not field_value(config, name) > 0:
            raise UserError(f"optimizer.{name} is {field_value(config, name)}; it must be positive")
    if config.muon.ns_steps > 100:
        raise UserError(f"optimizer.muon.ns_steps is {config.muon.ns_steps}; it must be at most 100")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise UserError(f"optimizer.clip_norm is {config.clip_norm}; it must be positive, or None not to clip")
    for name in ("muon", "sgd"):
        if field_value(config, f"{name}.nesterov") and not field_value(config, f"{name}.momentum"):
            raise UserError(f"optimizer.{name}.nesterov is set, but optimizer.{name}.momentum is 0")
    _check_used(config)
    if config.decay_steps is not None and config.schedule != "wsd":
        raise UserError(
            f"optimizer.decay_steps is set, but optimizer.schedule={config.schedule} ignores it; wsd has it"
        )
    if config.final_fraction and config.schedule == "constant":
        raise UserError(
            f"optimizer.final_fraction is {config.final_fraction}, but optimizer.schedule=constant ignores it"
        )
    for i, group in enumerate(config.groups):
        _compiled(group.match, f"optimizer.groups.{i}.match")
    make_schedule(config, steps)


def _check_used(config: OptimizerConfig) -> None:
    """Raises UserError for a field of a rule that neither the run nor a group has."""
    used = {config.rule, *(group.rule for group in config.groups)}
    if "muon" in used:
        used.add("adamw")
    default = OptimizerConfig()
    fields = {"adamw": ("beta1", "beta2", "eps"), **{name: (name,) for name in ("lion", "adafactor", "muon", "sgd")}}
    for rule, names in fields.items():
        for name in names if rule not in used else ():
            value, usual = getattr(config, name), getattr(default, name)
            if value != usual:
                if rule != "adamw":
                    name += "." + next(key for key in vars(value) if getattr(value, key) != getattr(usual, key))
                raise UserError(f"optimizer.{name} is set, but optimizer.rule={config.rule} ignores it; {rule} has it")
