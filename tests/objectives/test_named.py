"""The registry of `loss_type` strings says of every loss what its signature says."""

import inspect

import pytest

from llm_jax import objectives
from llm_jax.objectives.preference.named import LOSSES, Named

PAIR = ("chosen_logps", "rejected_logps")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
# Arguments that no config sets: which reading of a paper a caller wants.
READINGS = {"length_normalized", "halved"}
# What `DPOTrainer` and `KTOTrainer` of TRL 1.16 take as loss_type.
TRL = {"sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"}
TRL |= {"apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "kto", "apo_zero_unpaired"}


def arguments(named: Named) -> tuple[list[str], list[str]]:
    """What the job passes by position and by name."""
    first = ["logps", "ref_logps", "labels"] if named.unpaired else [*PAIR, *(REFERENCE if named.reference else ())]
    by_name = [*named.lengths, *named.options, *named.fixed]
    by_name += ["chosen_scores", "rejected_scores"] if named.scores else []
    by_name += ["chosen_nll"] if named.nll else []
    by_name += [named.statistics] if named.statistics else []
    return first, by_name + (["beta"] if named.has_beta else [])


@pytest.mark.parametrize("name", LOSSES)
def test_a_string_names_the_arguments_of_its_function(name):
    named = LOSSES[name]
    parameters = inspect.signature(getattr(objectives, named.function)).parameters
    first, by_name = arguments(named)
    assert list(parameters)[: len(first)] == first
    passed = first + by_name
    assert len(set(passed)) == len(passed)
    assert set(passed) <= set(parameters)
    assert set(parameters) - set(passed) <= READINGS
    assert {n for n, p in parameters.items() if p.default is p.empty} <= set(passed)


def test_the_strings_of_trl_are_there():
    assert set(LOSSES) >= TRL
    assert set(LOSSES) >= {"cpo", "simpo", "alphapo", "orpo"}


def test_every_export_is_importable():
    for name in objectives.__all__:
        assert callable(getattr(objectives, name)), name
