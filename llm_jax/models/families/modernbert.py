"""ModernBERT (Warner et al. 2024, arXiv:2412.13663), the encoder: full layers and layers that see a window to either
side, a rotary base for each kind, a norm on token vectors in place of the first layer's."""

from collections.abc import Mapping
from typing import Any, ClassVar

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.families.base import SPELLING, Family, read_sights, write_sights
from llm_jax.models.families.heads import SOME
from llm_jax.models.families.rope import of_full_layers, parameters_by_kind
from llm_jax.models.head_config import HeadConfig, Pooling

FLAGS = {"norm_bias": False, "decoder_bias": True, "classifier_bias": False}
POOLINGS: dict[str, Pooling] = {"cls": "first", "mean": "mean"}


class ModernBert(Family):
    MODEL_TYPE = "modernbert"
    ARCHITECTURE = "ModernBertForMaskedLM"
    FIELDS = {
        "vocab_size": ("vocab_size", 50368),
        "hidden_size": ("hidden_size", 768),
        "intermediate_size": ("intermediate_size", 1152),
        "num_layers": ("num_hidden_layers", 22),
        "num_heads": ("num_attention_heads", 12),
        "max_position_embeddings": ("max_position_embeddings", 8192),
        "norm_eps": ("norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "activation": ("hidden_activation", "gelu"),
        "init_std": ("initializer_range", 0.02),
    }
    CONSTANTS = {"causal": False, "embed_norm": True, "first_norm": False}
    CARRIED = {
        "cls_token_id",
        "classifier_dropout",
        "classifier_pooling",
        "decoder_bias",
        "deterministic_flash_attn",
        "embedding_dropout",
        "gradient_checkpointing",
        "initializer_cutoff_factor",
        "layer_norm_eps",
        "mlp_dropout",
        "position_embedding_type",
        "reference_compile",
        "repad_logits_with_grad",
        "sparse_pred_ignore_index",
        "sparse_prediction",
    }
    ALIASES = {"global_rope_theta": "rope_theta"}
    THETA = 160000.0
    TOKENS = {
        "bos_token_id": 50281,
        "cls_token_id": 50281,
        "eos_token_id": 50282,
        "sep_token_id": 50282,
        "pad_token_id": 50283,
    }
    TOP = {
        "embed": "model.embeddings.tok_embeddings",
        "embed_norm": "model.embeddings.norm",
        "norm": "model.final_norm",
        "transform/dense": "head.dense",
        "transform/norm": "head.norm",
        "head": "decoder",
        "vocab_bias": "decoder",
    }
    SCORE: ClassVar[dict[str, str]] = {"sequence": "classifier", "token": "classifier"}
    LAYER = {
        "attention_norm": "attn_norm",
        "attention/o": "attn.Wo",
        "mlp_norm": "mlp_norm",
        "mlp/down": "mlp.Wo",
    }
    FUSED = {
        "attn.Wqkv": ("attention/q", "attention/k", "attention/v"),
        "mlp.Wi": ("mlp/gate", "mlp/up"),
    }

    def derived_fields(self) -> set[str]:
        own = {"local_attention", "layer_types", "global_attn_every_n_layers", "classifier_activation"}
        return {"rope_theta", "rope_parameters", "local_rope_theta", "classifier_pooling"} | own | FLAGS.keys()

    def derived(self, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        wide = typed(int, hf.get("local_attention", 128), "config.json: local_attention")
        every = typed(int, hf.get("global_attn_every_n_layers", 3), "config.json: global_attn_every_n_layers")
        if every < 1:
            raise UserError(f"config.json: global_attn_every_n_layers={every}, it has to be positive")
        sights = read_sights(hf, full_every(every, values["num_layers"]))
        flat, theta = of_full_layers(hf, values, "local_rope_theta", 10000.0)
        return super().derived(flat, values) | {
            "norm": "layer" if self._flag(hf, "norm_bias") else "layer_unbiased",
            "window": wide // 2 + 1,
            "sights": sights,
            "local_rope_theta": theta,
        }

    def heads(self, hf: Mapping[str, Any]) -> dict[str, HeadConfig]:
        """Masked tokens; a text's scores, of its first token or the mean of all; each token's."""
        name = self.value_from_hf("activation", "classifier_activation", hf.get("classifier_activation", "gelu"))
        pooling = hf.get("classifier_pooling", "cls")
        if not isinstance(pooling, str) or pooling not in POOLINGS:
            raise UserError(f"config.json: classifier_pooling={pooling!r} is not one of {', '.join(POOLINGS)}")
        before: Any = {
            "transform": True,
            "transform_bias": self._flag(hf, "classifier_bias"),
            "transform_activation": name,
        }
        scores: Any = {"labels": SOME, "bias": True, **before}
        return {
            self.ARCHITECTURE: HeadConfig(bias=self._flag(hf, "decoder_bias"), **before),
            "ModernBertForSequenceClassification": HeadConfig(pooling=POOLINGS[pooling], **scores),
            "ModernBertForTokenClassification": HeadConfig(pooling="none", **scores),
        }

    def _flag(self, hf: Mapping[str, Any], name: str) -> bool:
        return typed(bool, hf.get(name, FLAGS[name]), f"config.json: {name}")

    def written(self, config: ModelConfig) -> dict[str, Any]:
        assert config.window is not None
        head = config.head
        fields = {
            "norm_bias": config.norm == "layer",
            "local_attention": 2 * (config.window - 1),
            "classifier_bias": head.transform_bias,
            "classifier_activation": SPELLING[head.transform_activation],
            "rope_parameters": parameters_by_kind(config),
            "global_rope_theta": config.rope_theta,
            "local_rope_theta": config.local_rope_theta,
        }
        if head.labels is None:
            fields["decoder_bias"] = head.bias
        poolings = {ours: theirs for theirs, ours in POOLINGS.items()}
        if head.pooling in poolings:
            fields["classifier_pooling"] = poolings[head.pooling]
        # Releases before layer_types know this spelling only.
        for every in range(1, config.num_layers + 1):
            if full_every(every, config.num_layers) == list(config.sights or ()):
                fields["global_attn_every_n_layers"] = every
                break
        return fields | write_sights(config)


def full_every(count: int, layers: int) -> list[str]:
    """A full layer, then `count` - 1 sliding ones, over and over."""
    return ["sliding" if layer % count else "full" for layer in range(layers)]


FAMILY = ModernBert()
