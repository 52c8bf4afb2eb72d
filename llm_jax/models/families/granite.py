"""Granite 3 (IBM 2024): a Llama with multipliers in the manner of μP."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import near
from llm_jax.models.families.llama import Llama


class Granite(Llama):
    MODEL_TYPE = "granite"
    ARCHITECTURE = "GraniteForCausalLM"
    FIELDS = {
        **Llama.FIELDS,
        "embed_scale": ("embedding_multiplier", 1.0),
        "residual_scale": ("residual_multiplier", 1.0),
        "query_scale": ("attention_multiplier", 1.0),
    }

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"logits_scaling"}

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        scaling = typed(float, hf.get("logits_scaling", 1.0), "config.json: logits_scaling")
        if scaling == 0:
            raise UserError("config.json: logits_scaling=0.0, logits are divided by it")
        return super().derived(hf, values) | {"logit_scale": 1.0 / scaling}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        return super().written(config) | {"logits_scaling": near(1.0 / config.logit_scale)}


FAMILY = Granite()
