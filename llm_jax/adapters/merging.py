"""An adapter into the weights: `W + s A B`, once and for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.adapters.adapters import Adapters
from llm_jax.base.trees import unflatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder

LORA = "/lora/"


def merged_params(adapters: Adapters, expanded: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the model without adapters that computes what `adapters.decoder` does with `expanded`
    (`Adapters.expand`); sums in float32, in the weights' dtypes. Pure.

    A head that is tied to an adapted embedding is another matrix after that: it is then a parameter of its own,
    `head/weight`, and the model no longer tied (see `merged_config`).
    """
    plain = {path: leaf for path, leaf in expanded.items() if LORA not in f"/{path}"}
    found = dict(plain)
    for path in expanded:
        part, _, name = path.rpartition(LORA)
        if name == "a":
            found[f"{part}/weight"] = _merged(part, expanded)
    if _unties(adapters):
        found["head/weight"] = plain["embed/weight"].T
    return unflatten(found)


def merged_config(adapters: Adapters) -> ModelConfig:
    """Of the model that `merged_params` are of."""
    config = adapters.decoder.config
    return dataclasses.replace(config, tie_embeddings=False) if _unties(adapters) else config


def _unties(adapters: Adapters) -> bool:
    config = adapters.decoder.config
    embeds = any(site.parts == ("embed",) for one in adapters.all for site in one.sites)
    return embeds and config.tie_embeddings and config.head.labels is None


def _merged(part: str, values: Mapping[str, Any]) -> jax.Array:
    weight, a, b, scale = (
        jnp.asarray(values[f"{part}/{name}"]) for name in ("weight", "lora/a", "lora/b", "lora/scale")
    )
    # [layers, rank] to [layers, (experts,) inputs, rank].
    wide = scale.reshape(*scale.shape[:-1], *[1] * (a.ndim - scale.ndim), scale.shape[-1])
    update = jnp.matmul(a.astype(jnp.float32) * wide, b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    whole = weight.astype(jnp.float32) + update
    magnitude = values.get(f"{part}/lora/magnitude")
    if magnitude is not None:
        length = jnp.sqrt(jnp.sum(jnp.square(whole), axis=-2))
        here = jnp.any(scale != 0, axis=-1, keepdims=True)
        whole = whole * jnp.where(here, magnitude / length, 1.0)[..., None, :]
    return whole.astype(weight.dtype)


def plain_decoder(adapters: Adapters, like: Decoder) -> Decoder:
    """Of `merged_params`: `like` where the model stays as it is, which it does but for a tie undone."""
    config = merged_config(adapters)
    return Decoder(config, remat=like.remat) if _unties(adapters) else like  # type: ignore[arg-type]
