"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): every other layer sees a window, first of all the first."""

from collections.abc import Mapping
from typing import Any

from llm_jax.models.families.base import every
from llm_jax.models.families.gemma import Gemma2Like


class Gemma2(Gemma2Like):
    MODEL_TYPE = "gemma2"
    ARCHITECTURE = "Gemma2ForCausalLM"
    FIELDS = {
        **Gemma2Like.FIELDS,
        "logit_softcap": ("final_logit_softcapping", 30.0),
        "attention_softcap": ("attn_logit_softcapping", 50.0),
    }

    def default_sights(self, hf: Mapping[str, Any], layers: int) -> list[str]:
        return every(2, "full", "sliding", layers)


FAMILY = Gemma2()
