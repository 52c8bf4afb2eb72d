"""Falcon-Mamba (Zuo et al. 2024, arXiv:2410.05355): Mamba with norms of what steps, B and C are made of."""

from collections.abc import Mapping
from typing import Any

from llm_jax.models.families.mamba import Mamba


class FalconMamba(Mamba):
    MODEL_TYPE = "falcon_mamba"
    ARCHITECTURE = "FalconMambaForCausalLM"
    MAMBA = {**Mamba.MAMBA, "norm_eps": ("mixer_rms_eps", 1e-6)}

    def mamba_from_hf(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().mamba_from_hf(hf, values), "selection_norm": "plain"}


FAMILY = FalconMamba()
