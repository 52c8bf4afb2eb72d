"""DeepSeek-V3 and R1 (arXiv:2412.19437): V2's layers, with experts chosen by sigmoid scores and a bias that follows
their load."""

from collections.abc import Collection, Mapping
from typing import Any

from llm_jax.models.config import ModelConfig
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families.deepseek_v2 import DeepseekV2, read_int


class DeepseekV3(DeepseekV2):
    MODEL_TYPE = "deepseek_v3"
    ARCHITECTURE = "DeepseekV3ForCausalLM"
    FIELDS = {
        **{name: how for name, how in DeepseekV2.FIELDS.items() if name != "mlp_bias"},
        "vocab_size": ("vocab_size", 129280),
        "hidden_size": ("hidden_size", 7168),
        "intermediate_size": ("intermediate_size", 18432),
        "num_layers": ("num_hidden_layers", 61),
        "num_heads": ("num_attention_heads", 128),
        "max_position_embeddings": ("max_position_embeddings", 4096),
        "rope_interleaved": ("rope_interleave", True),
    }
    CONSTANTS = {}
    FIXED = {
        "pretraining_tp": (1, None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
    }
    ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    EXPERTS = {
        "num": ("n_routed_experts", 256),
        "top_k": ("num_experts_per_tok", 8),
        "intermediate_size": ("moe_intermediate_size", 2048),
        "scale": ("routed_scaling_factor", 2.5),
        "normalize": ("norm_topk_prob", True),
    }
    EXPERTS_CONSTANTS = {"scores": "sigmoid", "correction_bias": True, "group_score": "top2"}
    FIRST_DENSE = 3
    SHARED = 1
    LAYER = {**DeepseekV2.LAYER, "mlp/router/correction": "mlp.gate.e_score_correction_bias"}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() - {"topk_method"} | {"num_nextn_predict_layers"}

    def read_groups(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ExpertsConfig` about groups."""
        return {"groups": read_int(hf, "n_group", 8), "top_groups": read_int(hf, "topk_group", 4)}

    def write_groups(self, experts: ExpertsConfig) -> dict[str, Any]:
        """The other way."""
        return {"n_group": experts.groups, "topk_group": experts.top_groups}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        # Layers that predict further tokens are not read (see `is_derived`), so none are in what is written.
        return super().written(config) | {"num_nextn_predict_layers": 0}

    def is_derived(self, name: str, config: ModelConfig) -> bool:
        """Also the layers of multi-token prediction, which come after the others; transformers leaves them out too."""
        return self._is_further(name, config) or super().is_derived(name, config)

    def notes(self, names: Collection[str], config: ModelConfig) -> list[str]:
        count = sum(self._is_further(name, config) for name in names)
        layers = f"{self.PREFIX}{config.num_layers} and on"
        return [f"{count} tensors of multi-token prediction ({layers}) are left unread"] if count else []

    def _is_further(self, name: str, config: ModelConfig) -> bool:
        number = name.removeprefix(self.PREFIX).partition(".")[0]
        return name.startswith(self.PREFIX) and number.isdecimal() and int(number) >= config.num_layers


FAMILY = DeepseekV3()
