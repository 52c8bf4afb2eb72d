"""What a folder's model ends in: `architectures` of its config.json, and the labels of those that end in scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.head_config import HeadConfig

LABELS = {"id2label", "label2id", "num_labels", "problem_type"}
"""Fields of a config.json that are of its scores, beside `architectures`."""
PAIRWISE = "llm_jax_pairwise"
"""Field of ours in the config.json of a model whose score compares two answers, one behind the other."""
SOME = 1
"""Labels of a class whose models have any number of them."""
OUTSIDE = ("lm_head.", "score.", "classifier.")
"""How tensors begin that have no prefix of the inner model."""


def read_head(hf: Mapping[str, Any], heads: Mapping[str, HeadConfig]) -> HeadConfig:
    """By `architectures`, of `heads` by class name (with `SOME` labels); the first where the field is absent.

    Raises UserError for another class.
    """
    value = hf.get("architectures")
    if value is None:
        return next(iter(heads.values()))
    known = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and value[0] in heads
    if not known:
        raise UserError(f"config.json: architectures={value!r} is not supported (only {', '.join(heads)})")
    head = heads[value[0]]
    return head if head.labels is None else replace(head, labels=count_labels(hf))


def write_head(config: ModelConfig, heads: Mapping[str, HeadConfig], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`architectures` and the labels' names. Raises UserError for a head that none of the family's classes has."""
    labels = config.head.labels
    wanted = config.head if labels is None else replace(config.head, labels=SOME)
    for name, head in heads.items():
        if head == wanted:
            return {"architectures": [name]} | ({} if labels is None else label_names(labels, extra))
    # The class to compare with: of the same kind of output first.
    name, near = min(
        heads.items(),
        key=lambda item: (
            item[1].labels != wanted.labels,
            item[1].pooling != wanted.pooling,
            item[1].bias != wanted.bias,
        ),
    )
    differing = ", ".join(
        f"model.head.{field}={getattr(wanted, field)!r} where {name} has {getattr(near, field)!r}"
        for field in _differing(wanted, near)
    )
    raise UserError(
        f"none of the {config.family} family's classes ends like this model: {differing}; "
        "a native folder (save_native) keeps any head"
    )


def _differing(one: HeadConfig, other: HeadConfig) -> list[str]:
    return [field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)]


def count_labels(hf: Mapping[str, Any]) -> int:
    """How many labels a config.json names; two where it says nothing, as transformers takes it."""
    names = typed(dict[str, str] | None, hf.get("id2label"), "config.json: id2label")
    count = typed(int | None, hf.get("num_labels"), "config.json: num_labels")
    if names is not None and count is not None and len(names) != count:
        raise UserError(f"config.json: num_labels is {count}, and id2label names {len(names)}")
    if names is not None:
        return len(names)
    return 2 if count is None else count


def label_names(count: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`id2label` and `label2id` for `count` labels, as transformers numbers them; none where `extra` names as many, nor
    for the two that an absent field means."""
    known = extra.get("id2label")
    if (2 if known is None else len(known)) == count:
        return {}
    names = [f"LABEL_{i}" for i in range(count)]
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}
