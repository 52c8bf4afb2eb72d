"""Granite 4 (IBM 2025): Granite's multipliers, Mamba-2 or attention in a layer, and experts beside a shared one."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import Mixer, ModelConfig
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families.experts import AllExperts, WithExperts
from llm_jax.models.families.granite import Granite
from llm_jax.models.families.llama import Llama
from llm_jax.models.families.states import WithMamba2, mamba2_fused, mamba2_names
from llm_jax.models.families.tensors import Holding

MIXERS: dict[str, Mixer] = {
    "linear_attention": "mamba2",
    "mamba": "mamba2",
    "full_attention": "attention",
    "attention": "attention",
}
"""Entry of `layer_types`, today's and as in published folders -> ours."""
RUNNING = {
    "moe.experts.gate_up_proj": "moe.input_linear.weight",
    "moe.experts.down_proj": "moe.output_linear.weight",
    "moe.router.weight": "moe.router.layer.weight",
}
"""Tensors of a running model of transformers 5 -> of a folder."""


class GraniteMoeHybrid(WithMamba2, WithExperts, Granite):
    MODEL_TYPE = "granitemoehybrid"
    ARCHITECTURE = "GraniteMoeHybridForCausalLM"
    FIELDS = {name: how for name, how in Granite.FIELDS.items() if name != "mlp_bias"}
    FIXED = {"normalization_function": ("rmsnorm", None)}
    CARRIED = WithExperts.CARRIED | {"mamba_chunk_size", "init_method", "use_mamba_kernels"}
    ALIASES = {"layers_block_type": "layer_types"}
    EXPERTS = {
        "num": ("num_local_experts", 8),
        "top_k": ("num_experts_per_tok", 2),
        "shared_size": ("shared_intermediate_size", 1024),
    }
    LAYER = {
        **{ours: theirs for ours, theirs in Llama.LAYER.items() if not ours.startswith("mlp/")},
        **mamba2_names("mamba"),
        "mlp/router": "block_sparse_moe.router.layer",
        "mlp/shared/down": "shared_mlp.output_linear",
    }
    RUNNING = {
        "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
        "block_sparse_moe.router.layer.": "block_sparse_moe.router.",
    }
    FUSED = {
        **mamba2_fused("mamba"),
        "block_sparse_moe.input_linear": ("mlp/gate", "mlp/up"),
        "block_sparse_moe.output_linear": ("mlp/down",),
        "shared_mlp.input_linear": ("mlp/shared/gate", "mlp/shared/up"),
    }
    # The folders' own tensors are of all experts at once.
    EACH = {}
    ALL = {}

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"layer_types", "position_embedding_type"}

    def mixers(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Mixer, ...]:
        types = typed(tuple[str, ...] | None, hf.get("layer_types"), "config.json: layer_types")
        for name in types or ():
            if name not in MIXERS:
                raise UserError(f"config.json: layer_types has {name!r}, not one of {', '.join(MIXERS)}")
        return ("mamba2",) * values["num_layers"] if types is None else tuple(MIXERS[name] for name in types)

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        found = super().derived(hf, values)
        if hf.get("position_embedding_type") != "rope":
            found |= {"positions": "none", "rope_dim": None, "rope_scaling": None}
        experts = found["experts"]
        if experts.num:
            return found
        return found | {"intermediate_size": experts.shared_size, "experts": ExpertsConfig()}

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.mixers is not None
        fields = super().written(config)
        # In the words that every release reads.
        fields["layer_types"] = ["mamba" if mixer == "mamba2" else "attention" for mixer in config.mixers]
        fields["position_embedding_type"] = "rope" if config.positions == "rope" else "nope"
        if config.positions == "none":
            fields["rope_theta"] = config.rope_theta
        if not config.experts.num:
            fields["shared_intermediate_size"] = config.intermediate_size
        return fields

    def layer_table(self, config: ModelConfig) -> Mapping[str, str]:
        """Without experts the shared one is an ordinary feed-forward layer."""
        return self.LAYER if config.experts.num else {**self.LAYER, "mlp/down": "shared_mlp.output_linear"}

    def fused_table(self, config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
        if config.experts.num:
            return self.FUSED
        return {**mamba2_fused("mamba"), "shared_mlp.input_linear": ("mlp/gate", "mlp/up")}

    def fused_form(self, theirs: str, config: ModelConfig) -> Holding:
        if theirs.startswith("block_sparse_moe."):
            return AllExperts()
        return super().fused_form(theirs, config)

    def canonical(self, name: str) -> str:
        for running, stored in RUNNING.items():
            if name.endswith(running):
                return name.removesuffix(running) + stored
        return name


FAMILY = GraniteMoeHybrid()
