"""Fewer key and value heads from a trained model, to be trained on for a little ("uptraining")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.families import family
from llm_jax.models.loading import Model

POOLED = tuple(f"attention/{name}/{leaf}" for name in ("k", "v") for leaf in ("weight", "bias"))
WHOLE_NORM = "attention/k_norm/weight"


def group_heads(model: Model, kv_heads: int) -> Model:
    """The model with `kv_heads` key and value heads, each the mean of those it stands for.

    Ainslie et al. 2023 (arXiv:2305.13245), section 2.1: better than keeping the first of each group, or new ones; what
    is lost comes back with some 5% of the original training tokens.

    Raises:
        UserError: `kv_heads` does not divide the heads that there are, or the family has no such models.
    """
    config = model.config.resolved()
    heads, size = config.num_kv_heads, config.head_dim
    assert heads is not None and size is not None
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(f"kv_heads={kv_heads} does not divide the model's {heads} key and value heads")
    fewer = dataclasses.replace(config, num_kv_heads=kv_heads)
    family(config.family).check(fewer)

    def pooled(path: str, leaf: Any) -> Any:
        whole_norm = path.endswith(WHOLE_NORM) and config.qk_norm == "whole"
        if not path.endswith(POOLED) and not whole_norm:
            return leaf
        parts = leaf.reshape(*leaf.shape[:-1], kv_heads, heads // kv_heads, size)
        return jnp.mean(parts.astype(jnp.float32), axis=-2).reshape(*leaf.shape[:-1], -1).astype(leaf.dtype)

    params: Mapping[str, Any] = unflatten({path: pooled(path, leaf) for path, leaf in flatten(model.params).items()})
    decoder = Decoder(fewer)
    return Model(decoder, params, fewer, model.tokenizer_dir, plan=model.plan, extra=model.extra, dtypes=model.dtypes)
