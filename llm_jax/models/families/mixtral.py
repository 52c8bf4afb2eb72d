"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): a Mistral with experts in every layer."""

from llm_jax.models.families.experts import WithExperts
from llm_jax.models.families.llama import Llama
from llm_jax.models.families.mistral import Mistral


class Mixtral(WithExperts, Mistral):
    MODEL_TYPE = "mixtral"
    ARCHITECTURE = "MixtralForCausalLM"
    THETA = 1e6
    FIELDS = {**Mistral.FIELDS, "norm_eps": ("rms_norm_eps", 1e-5), "window": ("sliding_window", None)}
    ALIASES = {"num_experts": "num_local_experts"}
    EXPERTS = {"num": ("num_local_experts", 8), "top_k": ("num_experts_per_tok", 2)}
    LAYER = {
        **{ours: theirs for ours, theirs in Llama.LAYER.items() if not ours.startswith("mlp/")},
        "mlp/router": "block_sparse_moe.gate",
    }
    RUNNING = {".block_sparse_moe.": ".mlp."}
    EACH = {
        "mlp/gate": "block_sparse_moe.experts.{}.w1",
        "mlp/up": "block_sparse_moe.experts.{}.w3",
        "mlp/down": "block_sparse_moe.experts.{}.w2",
    }
    ALL = {
        "block_sparse_moe.experts.gate_up_proj": ("mlp/gate", "mlp/up"),
        "block_sparse_moe.experts.down_proj": ("mlp/down",),
    }

    def canonical(self, name: str) -> str:
        return name.replace(".mlp.", ".block_sparse_moe.")


FAMILY = Mixtral()
