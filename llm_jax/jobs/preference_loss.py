"""The losses that a preference run is configured with: found by name, and every option checked against who reads it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from llm_jax import objectives
from llm_jax.base.errors import UserError
from llm_jax.base.nearest import nearest
from llm_jax.data.examples import Kind
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.objectives.preference.named import LOSSES, Named

OF_PAIRS = ("ld_alpha", "use_weighting")
"""Options that any loss on pairs takes: they change its log-probabilities or weigh its pairs."""
SMOOTHED_BY_PAIR = ("dpo",)
"""Losses that take a `label_smoothing` of each pair, where its record has one."""
WITHOUT = {"dpo": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo", "sigmoid_norm": "simpo"}
"""Losses of the same form on log-probabilities alone."""
SYNC = ("ref_model_mixup_alpha", "ref_model_sync_steps")


@dataclass(frozen=True)
class Term:
    """One loss of the sum."""

    name: str
    """As `loss_type` has it."""
    named: Named
    factor: float
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    """Its options, beta among them."""


@dataclass(frozen=True)
class PreferenceLoss:
    """A weighted sum of losses, all of pairs or all of unpaired answers."""

    terms: tuple[Term, ...]
    beta: float
    ld_alpha: float | None = None
    use_weighting: bool = False
    running_delta: bool = False

    @property
    def unpaired(self) -> bool:
        return self.terms[0].named.unpaired

    @property
    def kind(self) -> Kind:
        """What rows it takes."""
        if not self.unpaired:
            return "preference"
        return "unpaired_mismatched" if "kl" in self.statistics else "unpaired"

    @property
    def statistics(self) -> set[str]:
        """Names of the batch statistics its losses take."""
        return {term.named.statistics for term in self.terms if term.named.statistics is not None}

    @property
    def smoothed_by_pair(self) -> bool:
        """Whether a loss reads the records' `label_smoothing`."""
        return any(term.named.function in SMOOTHED_BY_PAIR for term in self.terms)

    @property
    def columns(self) -> tuple[str, ...]:
        """Numbers that every record has to have."""
        return ("chosen_score", "rejected_score") if any(term.named.scores for term in self.terms) else ()


def preference_loss(config: PreferenceConfig) -> PreferenceLoss:
    """The losses that a configuration names, and what it says of them.

    Raises:
      UserError: a loss is unknown (the nearest is named), losses do not go together, a number is out of range, or an
        option is set that none of the losses reads.
    """
    names = _names(config)
    factors = config.loss_weights or (1.0,) * len(names)
    if len(factors) != len(names):
        raise UserError(f"loss_weights has {len(factors)} numbers for {len(names)} losses ({', '.join(names)})")
    if min(factors) < 0 or not any(factors):
        raise UserError(f"loss_weights={factors}: no weight may be negative, and one has to be above 0")
    chosen = {name: LOSSES[name] for name in names}
    if len({named.unpaired for named in chosen.values()}) > 1:
        shown = ", ".join(f"{name} of {'answers' if chosen[name].unpaired else 'pairs'}" for name in names)
        raise UserError(f"loss_type adds losses of pairs and of unpaired answers, which have other rows: {shown}")
    _check_reference(config, chosen)
    _check_unread(config, chosen)
    _check_numbers(config, chosen)
    terms = tuple(
        Term(name, named, factor, getattr(objectives, named.function), _arguments(config, named))
        for (name, named), factor in zip(chosen.items(), factors, strict=True)
    )
    return PreferenceLoss(terms, config.beta, config.ld_alpha, config.use_weighting, config.running_delta)


def _names(config: PreferenceConfig) -> tuple[str, ...]:
    given = config.loss_type
    names = tuple(name.strip() for name in given.split(",")) if isinstance(given, str) else given
    if not names:
        raise UserError("loss_type is empty: it has to name a loss")
    for name in names:
        if name not in LOSSES:
            near = nearest(name, LOSSES)
            raise UserError(
                f"loss_type={name}: no such loss; "
                + (f"the nearest is {near}" if near else f"there are {', '.join(LOSSES)}")
            )
        if names.count(name) > 1:
            raise UserError(f"loss_type names {name} twice: give it the sum of both weights")
    return names


def _arguments(config: PreferenceConfig, named: Named) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in named.options}
    return ({"beta": config.beta} if named.has_beta else {}) | options | named.fixed


def _check_reference(config: PreferenceConfig, chosen: Mapping[str, Named]) -> None:
    if config.reference_logps == "none":
        for name, named in chosen.items():
            if named.reference:
                without = f" ({WITHOUT[named.function]} is without one)" if named.function in WITHOUT else ""
                raise UserError(f"reference_logps=none, but loss_type={name} is measured against a reference{without}")
        if config.reference is not None:
            raise UserError(f"reference={config.reference} is set, but reference_logps=none reads none")
    if not config.sync_ref_model:
        for name in SYNC:
            if getattr(config, name) != _default(name):
                raise UserError(f"{name}={getattr(config, name)} is set, but only sync_ref_model=True reads it")
        return
    if config.reference_logps != "live":
        raise UserError(
            f"sync_ref_model=True moves the reference, but reference_logps={config.reference_logps} keeps what it said"
            " first: set live"
        )
    if not 0 < config.ref_model_mixup_alpha <= 1:
        raise UserError(f"ref_model_mixup_alpha is {config.ref_model_mixup_alpha}; it must be above 0 and at most 1")
    if config.ref_model_sync_steps < 1:
        raise UserError(f"ref_model_sync_steps is {config.ref_model_sync_steps}; it must be at least 1")


def _check_unread(config: PreferenceConfig, chosen: Mapping[str, Named]) -> None:
    """Refuses an option that was set and that none of the losses reads."""
    pairs = not next(iter(chosen.values())).unpaired
    read = {option for named in chosen.values() for option in named.options} | set(OF_PAIRS if pairs else ())
    possible = {option for named in LOSSES.values() for option in named.options} | set(OF_PAIRS)
    for name in sorted(possible - read):
        if getattr(config, name) != _default(name):
            readers = [n for n, named in LOSSES.items() if name in named.options] or ["losses on pairs"]
            raise UserError(
                f"{name}={getattr(config, name)} is set, but loss_type={','.join(chosen)} does not read it"
                f" ({', '.join(readers)} would)"
            )
    if config.running_delta and all(named.statistics != "delta" for named in chosen.values()):
        raise UserError(
            f"running_delta=True is set, but loss_type={','.join(chosen)} has no reward shift (bco, bco_unpaired have)"
        )
    divergence = config.f_divergence_type
    if not divergence.startswith("alpha") and config.f_alpha_divergence_coef != _default("f_alpha_divergence_coef"):
        raise UserError(
            f"f_alpha_divergence_coef={config.f_alpha_divergence_coef} is set, but f_divergence_type={divergence}"
            " does not read it"
        )
    for name, named in chosen.items():
        if divergence != "reverse_kl" and named.reference and "f_divergence_type" not in named.options:
            raise UserError(f"f_divergence_type={divergence} is not defined for loss_type={name}")


def _check_numbers(config: PreferenceConfig, chosen: Mapping[str, Named]) -> None:
    if not config.beta > 0:
        raise UserError(f"beta is {config.beta}; it must be positive")
    if not 0 <= config.label_smoothing < 0.5:
        raise UserError(f"label_smoothing is {config.label_smoothing}; it must be at least 0 and below 0.5")
    if any(named.function == "exo" for named in chosen.values()) and config.label_smoothing == 0:
        raise UserError("loss_type=exo_pair takes the logarithm of label_smoothing, which is 0: its paper has 0.001")
    if config.ld_alpha is not None and not 0 <= config.ld_alpha <= 1:
        raise UserError(f"ld_alpha is {config.ld_alpha}; it must be in [0, 1]")
    if config.use_weighting:
        for name, named in chosen.items():
            if not named.pairwise:
                raise UserError(f"use_weighting=True weighs pairs, but loss_type={name} has no loss of a single pair")
    for name in ("desirable_weight", "undesirable_weight", "cpo_alpha", "rpo_alpha", "simpo_gamma", "dpop_lambda"):
        if not getattr(config, name) >= 0:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 0")
    if not config.discopop_tau > 0:
        raise UserError(f"discopop_tau is {config.discopop_tau}; it must be positive")


def _default(name: str) -> Any:
    return next(f.default for f in fields(PreferenceConfig) if f.name == name)
