"""Published model families: one file each, its config.json and tensor names both ways.

A family file holds `FAMILY`, an instance of a `base.Family`; a further one is a new file and its name in `FAMILIES`.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_jax.base.errors import UserError
from llm_jax.base.nearest import nearest

if TYPE_CHECKING:
    from llm_jax.models.families.base import Family

FAMILIES = (
    "bamba",
    "bloom",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "falcon",
    "falcon_mamba",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoehybrid",
    "jamba",
    "llama",
    "llama4_text",
    "llm_jax",
    "mamba",
    "mamba2",
    "mistral",
    "mixtral",
    "modernbert",
    "nemotron_h",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
"""Module names, which are also the `model_type` of config.json."""


def family(name: str) -> "Family":
    """The family. Raises UserError for one that is not known, naming the nearest."""
    if not isinstance(name, str) or name not in FAMILIES:
        close = nearest(name, FAMILIES) if isinstance(name, str) else None
        meant = f"; nearest: {close}" if close else ""
        raise UserError(f"model_type {name!r} is not a known family (known: {', '.join(FAMILIES)}{meant})")
    return importlib.import_module(f"llm_jax.models.families.{name}").FAMILY


def family_for(hf: Mapping[str, Any]) -> "Family":
    """The family of a Hugging Face config.json, by its `model_type`."""
    if "model_type" not in hf:
        raise UserError("config.json has no model_type")
    return family(hf["model_type"])
