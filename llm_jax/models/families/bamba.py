"""Bamba (IBM, Princeton, CMU, UIUC 2024): Mamba-2, and attention in a few layers, which turns half of a head."""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import Mixer, ModelConfig
from llm_jax.models.families.llama import Llama
from llm_jax.models.families.states import WithMamba2, mamba2_fused, mamba2_names


class Bamba(WithMamba2, Llama):
    MODEL_TYPE = "bamba"
    ARCHITECTURE = "BambaForCausalLM"
    PARTIAL = 0.5
    FIELDS = {
        **Llama.FIELDS,
        "vocab_size": ("vocab_size", 128000),
        "intermediate_size": ("intermediate_size", 14336),
        "num_kv_heads": ("num_key_value_heads", 8),
        "max_position_embeddings": ("max_position_embeddings", 262144),
        "norm_eps": ("rms_norm_eps", 1e-5),
    }
    CARRIED = {"mamba_chunk_size", "num_logits_to_keep", "use_mamba_kernels", "z_loss_coefficient"}
    TOP = {**Llama.TOP, "norm": "model.final_layernorm"}
    LAYER = {
        **Llama.LAYER,
        **mamba2_names("mamba"),
        "mlp_norm": "pre_ff_layernorm",
        "mlp/gate": "feed_forward.gate_proj",
        "mlp/up": "feed_forward.up_proj",
        "mlp/down": "feed_forward.down_proj",
    }
    FUSED = mamba2_fused("mamba")

    def derived_fields(self) -> set[str]:
        return super().derived_fields() | {"attn_layer_indices", "attn_rotary_emb"}

    def mixers(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Mixer, ...]:
        layers = values["num_layers"]
        where = "config.json: attn_layer_indices"
        attends = typed(tuple[int, ...] | None, hf.get("attn_layer_indices"), where) or ()
        for layer in attends:
            if not 0 <= layer < layers:
                raise UserError(f"{where} has {layer}, and num_hidden_layers is {layers}")
        return tuple("attention" if layer in attends else "mamba2" for layer in range(layers))

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        # transformers puts its own in the place of one at the top.
        if hf.get("partial_rotary_factor") not in (self.PARTIAL, None):
            said = hf["partial_rotary_factor"]
            raise UserError(f"config.json: partial_rotary_factor={said!r} is not supported (only {self.PARTIAL})")
        found = super().derived(hf, values)
        head_dim = values["head_dim"] or values["hidden_size"] // values["num_heads"]
        if hf.get("attn_rotary_emb") not in (found["rope_dim"] or head_dim, None):
            raise UserError(f"config.json: attn_rotary_emb={hf['attn_rotary_emb']!r} is not what turns of a head")
        return found

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.mixers is not None
        attends = [layer for layer, mixer in enumerate(config.mixers) if mixer == "attention"]
        fields = super().written(config) | {"attn_layer_indices": attends}
        # Among the rope parameters it counts.
        fields.pop("partial_rotary_factor", None)
        return fields


FAMILY = Bamba()
