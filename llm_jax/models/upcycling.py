"""A dense model, or a feed-forward layer of one, made into a mixture of experts, to be trained on ("upcycling")."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families import family
from llm_jax.models.loading import Model
from llm_jax.models.new_head import carried_extra, stored_dtypes
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.sharding import storage_shardings

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Families of dense models -> those of the same models with experts."""


def with_experts(model: Model, num: int, top_k: int, seed: int = 0, noise: float = 0.0) -> Model:
    """The model with `num` copies of each feed-forward layer for experts, `top_k` to a token (see `upcycle`).

    Its weights add up to 1, so that without noise it computes what the model did, until training tells the experts
    apart. `seed`: of routers and noise. Its family is one of `FAMILIES`, or `llm_jax` where none has such a model.

    Raises:
        UserError: the model has experts, layers for further tokens or no feed-forward layers, or `num` and `top_k` do
            not go together.
    """
    config = model.config.resolved()
    assert config.feed_forwards is not None
    kinds = config.feed_forwards
    if "dense" not in kinds or "experts" in kinds or config.mtp:
        raise UserError(
            "experts are made of the feed-forward layers of a dense model; this one has feed_forwards="
            f"{','.join(sorted({*kinds}))}, mtp={config.mtp}"
        )
    experts = ExpertsConfig(num, top_k, config.intermediate_size, bias=config.mlp_bias)
    kinds = tuple("experts" if kind == "dense" else kind for kind in kinds)
    made = dataclasses.replace(config, family="llm_jax", feed_forwards=kinds, experts=experts)
    made.resolved()
    published = dataclasses.replace(made, family=FAMILIES.get(config.family, "llm_jax"))
    try:
        family(published.family).check(published)
        made = published
    except UserError as reason:
        log(f"experts: a model of the family llm_jax, and not of {published.family}: {reason}")
    decoder, keys = Decoder(made), itertools.count()
    flat = flatten(model.params)
    params = {path: leaf for path, leaf in flat.items() if "/mlp/" not in path}
    for at in dict.fromkeys(path.partition("/mlp/")[0] + "/mlp/" for path in flat if "/mlp/" in path):
        dense = unflatten({path.removeprefix(at): leaf for path, leaf in flat.items() if path.startswith(at)})
        key = jax.random.fold_in(jax.random.key(seed), next(keys))
        own = flatten(upcycle(dense, num, key, router_std=config.init_std, noise=noise))
        params |= {at + path: leaf for path, leaf in own.items()}
    if model.plan is not None:
        shardings = flatten(storage_shardings(declarations(decoder), abstract_params(decoder), model.plan))
        params = {path: jax.device_put(leaf, shardings[path]) for path, leaf in params.items()}
    extra, dtypes = carried_extra(model, made.family), stored_dtypes(model, decoder)
    return Model(decoder, unflatten(params), made, model.tokenizer_dir, plan=model.plan, extra=extra, dtypes=dtypes)


def upcycle(
    dense: Mapping[str, Any],
    num: int,
    key: Key[Array, ""],
    *,
    router_std: float = 0.02,
    noise: float = 0.0,
) -> dict[str, Any]:
    """Parameters of `Experts` with `num` experts, each a copy of the layer: Komatsuzaki et al. 2022 (arXiv:2212.05055).

    With weights that add up to 1 (`normalize`, `scale=1`), nothing dropped and no noise, the new layer computes what
    the dense one did, whatever its router says.

    Args:
        dense: parameters of a `FeedForward`, `gate`, `up`, `down` with `weight` [*layers, inputs, outputs] and `bias`.
        key: of the router's and the noise's numbers.
        router_std: standard deviation of the router's initial weights.
        noise: to each expert's weights normal numbers are added, of `noise` times the standard deviation of the dense
            weight they are a copy of (of its layer, where layers are stacked); biases stay.

    Returns:
        `{"router": {"weight": [*layers, D, E]}, ...}` and each part of `dense` with an axis of experts before its own.
    """
    flat, out = flatten(dense), {}
    for i, path in enumerate(sorted(flat)):
        value, own = flat[path], 2 if path.endswith("weight") else 1
        copies = jnp.repeat(jnp.expand_dims(value, -1 - own), num, -1 - own)
        if noise and own == 2:
            size = noise * jnp.std(value, (-2, -1), keepdims=True)[..., None, :, :]
            copies += size * jax.random.normal(jax.random.fold_in(key, i + 1), copies.shape, copies.dtype)
        out[path] = copies
    *layers, width, _ = flat["up/weight"].shape
    router = router_std * jax.random.normal(jax.random.fold_in(key, 0), (*layers, width, num), jnp.float32)
    return unflatten({**out, "router/weight": router})
