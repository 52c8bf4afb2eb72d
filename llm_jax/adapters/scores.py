"""Adapters that bring scores: of reward models and classifiers whose folder holds an adapter of a language model.

PEFT trains the last projection of such a model whole and keeps it with the adapter; what the adapter is on may then be
any model of the family, and still end in logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from etils import epath

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.peft_files import PREFIX, WEIGHTS, is_peft_folder
from llm_jax.adapters.sites import PROJECTIONS
from llm_jax.models.config import ModelConfig
from llm_jax.models.families import family
from llm_jax.models.families.heads import LABELS, PAIRWISE
from llm_jax.models.head_config import HeadConfig
from llm_jax.models.loading import read_model_config
from llm_jax.storage.safetensors import read_file_index


def with_projection(config: LoraConfig) -> LoraConfig:
    """The last projection is trained whole too, as by PEFT for the task types SEQ_CLS and TOKEN_CLS."""
    given = config.modules_to_save or ()
    return replace(config, modules_to_save=(*given, *(name for name in PROJECTIONS if name not in given)))


def with_head_of(path: epath.Path, base: ModelConfig) -> ModelConfig:
    """The architecture `base` as the adapter at `path` (a PEFT folder or a workdir) has it end."""
    head = head_of(path, base)
    return base if head == base.head else replace(base.resolved().without_further(), head=head)


def head_of(path: epath.Path, base: ModelConfig) -> HeadConfig:
    """What a model of the architecture `base` ends in with the adapter at `path`, a PEFT folder or a workdir.

    A folder tells by its tensors: the class of the family whose last projection it has.
    """
    if not is_peft_folder(path):
        return read_model_config(path).head
    if not base.causal:
        # An encoder has more between its layers and its scores than an adapter brings.
        return base.head
    stored, own = read_file_index(path / WEIGHTS), family(base.family)
    for head in own.heads({}).values():
        module = own.SCORE["token" if head.pooling == "none" else "sequence"]
        weight = stored.get(f"{PREFIX}{own.running(f'{module}.weight')}")
        biased = f"{PREFIX}{own.running(f'{module}.bias')}" in stored
        if head.labels is not None and weight is not None and biased == head.bias:
            return replace(head, labels=weight.shape[0])
    return base.head


def of_scores(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that are of its scores: the names of classes, and whether it compares."""
    return {name: value for name, value in extra.items() if name == PAIRWISE or name in LABELS}
