"""DeepSeek-V3 and R1 (arXiv:2412.19437): V2's layers, with experts chosen by sigmoid scores and a bias that follows
their load."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.trees import flatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families.deepseek_v2 import DeepseekV2, read_int
from llm_jax.models.families.further import WithFurther
from llm_jax.models.families.tensors import Form, Tensor
from llm_jax.models.parameter import declarations


class DeepseekV3(WithFurther, DeepseekV2):
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
        "mtp": ("num_nextn_predict_layers", 1),
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

    FURTHER = {**WithFurther.FURTHER, "norm": "shared_head.norm"}
    COPIES = {"embed/weight": "embed_tokens.weight", "head/weight": "shared_head.head.weight"}
    """Parameters of the model that each of them has in a tensor of its own too."""

    def derived_fields(self) -> set[str]:
        return super().derived_fields() - {"topk_method"}

    def further_prefix(self, config: ModelConfig, depth: int, path: str) -> str:
        """They come after all other layers."""
        del path
        return f"{self.PREFIX}{config.num_layers + depth}."

    def tensors(self, decoder: Decoder, present: frozenset[str] = frozenset()) -> list[Tensor]:
        """With those of further tokens' layers, and their copies of others."""
        config, found = decoder.config, self.further_tensors(decoder)
        declared = flatten(declarations(decoder))
        for depth in range(config.mtp):
            for path, theirs in self.COPIES.items():
                name = self.further_prefix(config, depth, path) + theirs
                if path in declared and (not present or name in present):
                    found.append(Tensor((name,), (path,), None, Form(transposed=path.startswith("head"))))
        # Last, so that a parameter with copies is read from the tensor that is not one.
        return found + super().tensors(decoder, present)

    def read_groups(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ExpertsConfig` about groups."""
        return {"groups": read_int(hf, "n_group", 8), "top_groups": read_int(hf, "topk_group", 4)}

    def write_groups(self, experts: ExpertsConfig) -> dict[str, Any]:
        """The other way."""
        return {"n_group": experts.groups, "topk_group": experts.top_groups}


FAMILY = DeepseekV3()
