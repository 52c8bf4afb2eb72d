"""Published model families: one file each, its config.json and weight names both ways.

A family file offers `MODEL_TYPE`, `from_hf`, `carried`, `to_hf`, `weight_names`, `is_derived` and `flops_per_token`, as
`llama.py` does; a further one is a new file and its name in `FAMILIES`.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from llm_jax.base.errors import UserError

FAMILIES = ("llama", "mistral")
"""Module names, which are also the `model_type` of config.json."""


def family(name: str) -> ModuleType:
    """The family's module. Raises UserError for one that is not known."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"model_type {name!r} is not a known family (known: {', '.join(FAMILIES)})")
    return importlib.import_module(f"llm_jax.models.families.{name}")


def family_for(hf: Mapping[str, Any]) -> ModuleType:
    """The family of a Hugging Face config.json, by its `model_type`."""
    if "model_type" not in hf:
        raise UserError("config.json has no model_type")
    return family(hf["model_type"])
