"""A model that ends in scores from one that ends in the vocabulary: where reward, value and classification start."""

from __future__ import annotations

import dataclasses
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.families import family
from llm_jax.models.families.heads import LABELS
from llm_jax.models.head_config import HeadConfig
from llm_jax.models.init import init_params
from llm_jax.models.loading import Model
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.sharding import storage_shardings


def with_head(model: Model, head: HeadConfig, seed: int = 0) -> Model:
    """The model with `head` for an end. All arrays are the model's, but for those of the head that it does not have.

    These are drawn as the same parameters of a new model of that `seed`, on the model's mesh. Of a model that ends in
    as many scores already all are kept: only what they are pooled from changes. Layers for further tokens (`mtp`) go
    with the vocabulary.

    Raises:
        UserError: `head` has no labels, or the model ends in another number of scores.
    """
    if head.labels is None:
        raise UserError("a new head is for scores: head.labels has to be a number")
    before, config = model.config.head, dataclasses.replace(model.config.resolved().without_further(), head=head)
    if before.labels not in (None, head.labels):
        raise UserError(f"the model ends in {before.labels} scores, not in {head.labels}; their head is not replaced")
    decoder = Decoder(config)
    old, shapes = flatten(model.params), abstract_params(decoder)
    shardings = None if model.plan is None else storage_shardings(declarations(decoder), shapes, model.plan)
    drawn = flatten(init_params(decoder, seed, shardings, lambda path: path not in old))
    dtype = old["embed/weight"].dtype
    params = {path: old[path] if path in old else drawn[path].astype(dtype) for path in flatten(shapes)}
    extra = {name: value for name, value in model.extra.items() if name not in LABELS}
    kinds = stored_dtypes(model, decoder)
    return Model(decoder, unflatten(params), config, model.tokenizer_dir, plan=model.plan, extra=extra, dtypes=kinds)


def carried_extra(model: Model, name: str) -> dict[str, Any]:
    """Of what the model's config.json said beside its architecture, what says something in the family `name` too."""
    return {field: value for field, value in family(name).carried(model.extra).items() if field != "model_type"}


def stored_dtypes(model: Model, decoder: Decoder) -> dict[str, Any]:
    """Of the tensors in a folder of `decoder`, made of `model`: new ones like the others, where these are of one dtype,
    float32 where not."""
    kinds = set(model.dtypes.values())
    new = kinds.pop() if len(kinds) == 1 else "float32"
    names = (name for tensor in family(decoder.config.family).tensors(decoder) for name in tensor.names)
    return {name: model.dtypes.get(name, new) for name in names} if model.dtypes else {}
