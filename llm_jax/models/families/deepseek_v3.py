"""DeepSeek-V3 and R1 (arXiv:2412.19437): V2's layers, with experts chosen by sigmoid scores and a bias that follows
their load."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from llm_jax.base.trees import flatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families.deepseek_v2 import DeepseekV2, read_int
from llm_jax.models.families.tensors import Form, Tensor
from llm_jax.models.parameter import declarations


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

    FURTHER = {"embed_norm": "enorm", "hidden_norm": "hnorm", "project": "eh_proj", "norm": "shared_head.norm"}
    """Modules beside the block of a layer that predicts a further token; such layers come after all others."""
    COPIES = {"embed/weight": "embed_tokens.weight", "head/weight": "shared_head.head.weight"}
    """Parameters of the model that each of them has in a tensor of its own too."""

    def derived_fields(self) -> set[str]:
        return super().derived_fields() - {"topk_method"}

    def as_stored(self, config: ModelConfig, names: Collection[str]) -> ModelConfig:
        """transformers writes `num_nextn_predict_layers` as it was, and leaves out the layers."""
        first = f"{self.PREFIX}{config.num_layers}."
        return config if any(name.startswith(first) for name in names) else dataclasses.replace(config, mtp=0)

    def tensors(self, decoder: Decoder, present: frozenset[str] = frozenset()) -> list[Tensor]:
        """With those of further tokens' layers."""
        config, found = decoder.config, []
        declared = flatten(declarations(decoder))
        for k in range(config.mtp):
            start, prefix = f"mtp/{k}/", f"{self.PREFIX}{config.num_layers + k}."
            for inside, table in (("block/", self.layer_table(config)), ("", self.FURTHER)):
                at = start + inside
                own = {path.removeprefix(at): d for path, d in declared.items() if path.startswith(at)}
                own = {path: d for path, d in own.items() if not path.startswith("block/")}
                for tensor in self._named(own, table, prefix, None, config):
                    paths = tuple(at + path for path in tensor.paths)
                    found.append(dataclasses.replace(tensor, paths=paths))
            for path, name in self.COPIES.items():
                if path in declared and (not present or prefix + name in present):
                    found.append(Tensor((prefix + name,), (path,), None, Form(transposed=path.startswith("head"))))
        # Last, so that a parameter with copies is read from the tensor that is not one.
        return found + super().tensors(decoder, present)

    def read_groups(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ExpertsConfig` about groups."""
        return {"groups": read_int(hf, "n_group", 8), "top_groups": read_int(hf, "topk_group", 4)}

    def write_groups(self, experts: ExpertsConfig) -> dict[str, Any]:
        """The other way."""
        return {"n_group": experts.groups, "topk_group": experts.top_groups}


FAMILY = DeepseekV3()
