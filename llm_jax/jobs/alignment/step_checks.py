"""What the fields of the methods that go step by step have to be."""

import math
from dataclasses import fields

from llm_jax.base.errors import UserError
from llm_jax.jobs.config import RoundsConfig, StepsConfig, TreeConfig
from llm_jax.jobs.preference_loss import preference_loss

STEPWISE = {"step_dpo": "steps", "mcts_dpo": "tree"}
LEAST = {"steps.most": 1, "tree.simulations": 1, "tree.root_factor": 1, "tree.depth": 1}


def check_steps(config: RoundsConfig) -> None:
    """Raises UserError for a field out of range, or one that the method does not read."""
    for group, default in (("steps", StepsConfig()), ("tree", TreeConfig())):
        given = getattr(config, group)
        for field in fields(default):
            value = getattr(given, field.name)
            if STEPWISE.get(config.method) != group and value != getattr(default, field.name):
                raise UserError(f"{group}.{field.name}={value!r} is not read by method={config.method}")
            least = LEAST.get(f"{group}.{field.name}")
            if least is not None and value < least:
                raise UserError(f"{group}.{field.name} is {value}; it must be at least {least}")
    if config.method in STEPWISE and config.sampling.stop:
        why = "answers end by themselves" if config.method == "step_dpo" else "steps are closed by tree.separator"
        raise UserError(f"sampling.stop={config.sampling.stop} is not read by method={config.method}: {why}")
    if config.method == "step_dpo" and config.pairs.truncated != "drop":
        raise UserError(
            f"pairs.truncated={config.pairs.truncated} is not read by method=step_dpo: what was cut off has no result"
        )
    if config.method == "mcts_dpo":
        _check_tree(config)


def _check_tree(config: RoundsConfig) -> None:
    tree = config.tree
    for name in ("exploration", "length_penalty"):
        if not (getattr(tree, name) >= 0 and math.isfinite(getattr(tree, name))):
            raise UserError(f"tree.{name} is {getattr(tree, name)}; it must be at least 0")
    if not 0 < tree.discount <= 1:
        raise UserError(f"tree.discount is {tree.discount}; it must be above 0 and at most 1")
    if not tree.separator:
        raise UserError("tree.separator is empty: something has to close a step")
    if tree.value == "outcome" and tree.question != TreeConfig.question:
        raise UserError(f"tree.question={tree.question!r} is not read by tree.value=outcome: set self or both")
    if config.scorer.pairwise:
        raise UserError("scorer.pairwise=True compares two answers, and method=mcts_dpo scores one at a time")
    loss = preference_loss(config.preference)
    if tree.smoothing == "visits" and not loss.smoothed_by_pair:
        raise UserError(
            f"tree.smoothing=visits gives each pair a label_smoothing, which preference.loss_type="
            f"{','.join(term.name for term in loss.terms)} does not read (sigmoid does): set none"
        )
