"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): every other layer sees a window, first of all the first."""

from llm_jax.models.families.gemma import Gemma2Like


class Gemma2(Gemma2Like):
    MODEL_TYPE = "gemma2"
    ARCHITECTURE = "Gemma2ForCausalLM"
    FIELDS = {
        **Gemma2Like.FIELDS,
        "logit_softcap": ("final_logit_softcapping", 30.0),
        "attention_softcap": ("attn_logit_softcapping", 50.0),
    }


FAMILY = Gemma2()
