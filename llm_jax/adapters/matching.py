"""Which modules a configuration means: PEFT's rules, on transformers' names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.places import Place
from llm_jax.base.errors import UserError
from llm_jax.base.nearest import nearest

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Chosen:
    """A place with an adapter."""

    place: Place
    rank: int
    scale: float
    by_parameter: bool
    """Whether `target_parameters` named it."""


def check_config(config: LoraConfig) -> None:
    """Raises UserError for numbers out of range, for patterns that are no regular expressions, and for fields that
    exclude each other."""
    for name, ranks in (("r", [config.r]), ("rank_pattern", config.rank_pattern.values())):
        for rank in ranks:
            if rank < 1:
                raise UserError(f"adapter.{name} has {rank}; a rank is at least 1")
    for name, alphas in (("lora_alpha", [config.lora_alpha]), ("alpha_pattern", config.alpha_pattern.values())):
        for alpha in alphas:
            if not 0 < alpha < math.inf:
                raise UserError(f"adapter.{name} has {alpha}; it must be a positive number")
    if not 0 <= config.lora_dropout < 1:
        raise UserError(f"adapter.lora_dropout is {config.lora_dropout}; it must be in [0, 1)")
    ratio = config.loraplus_lr_ratio
    if ratio is not None and not 0 < ratio < math.inf:
        raise UserError(f"adapter.loraplus_lr_ratio is {ratio}; it must be positive, or None")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise UserError("adapter.layers_to_transform is set, but target_modules as one text ignores it; give a list")
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise UserError("adapter.layers_pattern is set, but without layers_to_transform nothing reads it")
    if not config.target_modules and not config.target_parameters:
        raise UserError("adapter.target_modules and adapter.target_parameters are both empty")
    if config.target_parameters and (config.lora_dropout or config.use_dora):
        field = "use_dora" if config.use_dora else "lora_dropout"
        raise UserError(f"adapter.{field} is set, but parameters (adapter.target_parameters) can't have it")
    if config.target_parameters and config.init_lora_weights not in (True, False, "gaussian"):
        raise UserError(f"adapter.init_lora_weights={config.init_lora_weights} is not for adapter.target_parameters")
    texts = [*config.rank_pattern, *config.alpha_pattern, *_words(config.layers_pattern)]
    regular = (config.target_modules, config.exclude_modules)
    for text in [*texts, *(field for field in regular if isinstance(field, str))]:
        try:
            re.compile(text)
        except re.error as error:
            raise UserError(f"adapter: {text!r} is no regular expression: {error}") from None


def choose(config: LoraConfig, found: Sequence[Place]) -> list[Chosen]:
    """The places that the configuration names, with the rank and the scale of each.

    Raises UserError for a target that matches nothing (the nearest name is said), and for a module that can't have
    an adapter in this way.
    """
    by_module = [p for p in found if p.kind in ("linear", "embedding") and is_targeted(config, p)]
    by_parameter = [p for p in found if _ends(p.name, config.target_parameters)]
    _check_all_used(config, found)
    if both := next((p for p in by_parameter if p in by_module), None):
        raise UserError(f"adapter.target_parameters names {both.name}, whose module adapter.target_modules has too")
    return [
        Chosen(place, *_rank_and_scale(config, place.name if given else place.module), given)
        for chosen, given in ((by_module, False), (by_parameter, True))
        for place in chosen
    ]


def is_targeted(config: LoraConfig, place: Place) -> bool:
    """PEFT's `check_target_module_exists` for a linear module or an embedding."""
    name, targets = place.module, config.target_modules
    if isinstance(config.exclude_modules, str):
        if re.fullmatch(config.exclude_modules, name):
            return False
    elif _ends(name, config.exclude_modules):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ()):
        return False
    if not targets:
        return False
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return place.kind == "linear" and place.parts[0] not in ("head", "score")
        return re.fullmatch(targets, name) is not None
    return name in targets or (_ends(name, targets) and _in_layers(config, name))


def _in_layers(config: LoraConfig, name: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return True
    patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in _words(config.layers_pattern)] or [
        r".*?\.[^.]*\.(?P<idx>\d+)\."
    ]
    match = next((m for m in (re.match(p, name) for p in patterns) if m is not None), None)
    return match is not None and int(match["idx"]) in ((wanted,) if isinstance(wanted, int) else wanted)


def _rank_and_scale(config: LoraConfig, name: str) -> tuple[int, float]:
    def of(pattern: Mapping[str, float], usual: float) -> float:
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), usual)

    rank, alpha = int(of(config.rank_pattern, config.r)), of(config.alpha_pattern, config.lora_alpha)
    return rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _check_all_used(config: LoraConfig, found: Sequence[Place]) -> None:
    modules = [p.module for p in found if p.kind in ("linear", "embedding")]
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() != ALL_LINEAR and not any(re.fullmatch(targets, name) for name in modules):
            raise UserError(f"adapter.target_modules {targets!r} matches no module; one is {modules[0]}")
    else:
        _check_each("target_modules", targets or (), modules)
    _check_each("target_parameters", config.target_parameters or (), [p.name for p in found])
    if targets and not any(is_targeted(config, p) for p in found if p.kind in ("linear", "embedding")):
        raise UserError(
            f"adapter.target_modules {shown(targets)} leaves no module "
            f"(layers_to_transform={config.layers_to_transform}, exclude_modules={config.exclude_modules})"
        )


def _check_each(field: str, wanted: Iterable[str], names: Sequence[str]) -> None:
    for target in wanted:
        if not any(_ends(name, (target,)) for name in names):
            raise UserError(f"adapter.{field} {target!r} matches nothing{_near(target, names)}")


def _near(target: str, names: Sequence[str]) -> str:
    size = target.count(".") + 1
    ends = dict.fromkeys(".".join(name.split(".")[-size:]) for name in names)
    near = nearest(target, ends)
    return f"; the nearest is {near}" if near else f"; there are {', '.join(list(ends)[:8])}"


def shown(targets: Sequence[str] | str) -> str:
    """Targets as a person would read them."""
    return repr(targets) if isinstance(targets, str) else repr(list(targets))


def _ends(name: str, endings: Iterable[str] | None) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings or ())


def _words(value: Sequence[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
