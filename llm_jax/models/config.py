"""What a decoder is made of, as plain fields. Families map a Hugging Face `config.json` to this and back."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm_jax.base.errors import UserError
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.head_config import Activation, HeadConfig
from llm_jax.models.latent_config import LatentConfig
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.rope_config import RopeScaling

POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "max_position_embeddings",
    "query_growth_every",
)
POSITIVE_OR_NONE = (
    "rope_theta",
    "local_rope_theta",
    "query_scale",
    "query_growth",
    "attention_softcap",
    "logit_softcap",
    "qkv_clip",
)
MULTIPLIERS = ("alibi_scale", "embed_scale", "residual_scale", "logit_scale")

# What the layers with latent attention have no place for.
LATENT_ONLY = {
    "positions": "rope",
    "qk_norm": "none",
    "sinks": False,
    "attention_softcap": None,
    "query_growth": None,
    "attention_gate": "none",
}

MOST_LAYERS = 2_000
"""Of a model, and of its layers for further tokens: DeepNet (arXiv:2203.00555), the deepest that is published, has
1,000, and beyond this the lists with an entry for each keep a machine busy before any size is checked."""

Mixer = Literal["attention", "latent", "mamba", "mamba2", "none"]
"""What mixes the tokens in a layer."""
FeedForwardKind = Literal["dense", "experts", "none"]
Sight = Literal["full", "sliding", "chunked"]
"""What an attention layer sees: all before, the last `window` tokens, or those of its own `chunk`."""


@dataclass(frozen=True)
class ModelConfig:
    family: str = "llama"
    """Published family whose weight names and config.json the model is saved under."""
    vocab_size: int | None = None
    """Rows of the embedding; None takes the tokenizer's size."""
    hidden_size: int = 128
    """D, width of the residual stream."""
    intermediate_size: int = 384
    """F, width of the feed-forward layer."""
    num_layers: int = 4
    """L."""
    num_heads: int = 4
    """N, query heads."""
    num_kv_heads: int | None = None
    """K, key and value heads; None means one per query head."""
    head_dim: int | None = None
    """H; None means hidden_size / num_heads."""
    max_position_embeddings: int = 2048
    """Longest sequence the model is meant for, in tokens."""

    causal: bool = True
    """Whether a token sees only what comes before it; in an encoder it sees all of its document."""
    prefix_lm: bool = False
    """Whether tokens before a document's first target, as a prompt's, see each other from both sides (a prefix language
    model)."""
    window: int | None = None
    """Tokens that a token of a sliding layer sees, itself included; in an encoder on either side."""
    chunk: int | None = None
    """Tokens of a chunk, of chunked layers (Llama 4): a token sees those of its own chunk before it."""
    sights: tuple[Sight, ...] | None = None
    """What each layer's attention sees; None means sliding in all layers where there is a window, full where not."""

    positions: Literal["rope", "alibi", "learned", "sinusoidal", "none"] = "rope"
    """How the model knows the order of tokens."""
    alibi_scale: float = 1.0
    """Multiplies ALiBi's slopes (Falcon divides them by the root of head_dim, as the scores)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    local_rope_theta: float | None = None
    """The base in sliding layers, unscaled; None means rope_theta, scaled as elsewhere."""
    rope_scaling: RopeScaling | None = None
    """Rotary angles beyond the trained length."""
    rope_dim: int | None = None
    """Coordinates of a head that turn, the first ones; None means all."""
    rope_interleaved: bool = False
    """Whether neighbours are turned together, (0, 1), (2, 3), …; otherwise (0, R/2), (1, R/2 + 1), …"""
    rope_layers: tuple[bool, ...] | None = None
    """Which layers turn queries and keys at all; None means all of them."""

    norm: Literal["rms", "rms_offset", "layer", "layer_unbiased"] = "rms"
    """RMSNorm; the same with weights stored less 1 (Gemma); LayerNorm with bias; LayerNorm without (Cohere)."""
    norm_eps: float = 1e-5
    """Added to the mean square, or variance, inside of norms."""
    norm_at: Literal["pre", "output", "sandwich", "post"] = "pre"
    """Where a layer norms: what goes into a sublayer; what comes out of it (OLMo 2); both (Gemma 2); the sum (2017)."""
    parallel: Literal["no", "one_norm", "two_norms"] = "no"
    """Attention and feed-forward side by side on the layer's input, after one norm or one each (GPT-NeoX)."""
    residual_normed: bool = False
    """Whether a sublayer's result is added to its normed input and not to the input (an option of BLOOM)."""
    embed_norm: bool = False
    """A norm right after the embedding (BLOOM)."""
    embed_scale: float = 1.0
    """Multiplies token vectors."""
    residual_scale: float = 1.0
    """Multiplies what a sublayer adds to the residual stream (Granite)."""
    first_norm: bool = True
    """Whether the first layer norms what goes into its mixer (ModernBERT does not: token vectors have their norm)."""
    logit_scale: float = 1.0
    """Multiplies logits."""
    logit_softcap: float | None = None
    """Logits become c tanh(logits / c) (Gemma 2)."""
    tie_embeddings: bool = False
    """Whether the output head is the transposed embedding."""

    qk_norm: Literal["none", "head", "whole", "plain"] = "none"
    """RMSNorm of queries and keys before they turn: of each head (Qwen 3), or of all heads at once (OLMo 2). `plain`:
    of each head after it has turned, without weights, in layers that turn them (Llama 4)."""
    query_scale: float | None = None
    """Multiplies attention's scores; None means head_dim ** -0.5."""
    query_growth: float | None = None
    """Where set, queries at position p of layers that don't turn them are multiplied by
    1 + query_growth log(1 + floor((p + 1) / query_growth_every)) (Llama 4)."""
    query_growth_every: int = 8192
    """Positions after which that factor grows."""
    scale_by_depth: bool = False
    """Whether scores of layer l, from 0, are also divided by l + 1 (an option of GPT-2)."""
    attention_softcap: float | None = None
    """Scores become c tanh(scores / c) (Gemma 2)."""
    qkv_clip: float | None = None
    """Queries, keys and values are cut at plus and minus this, before they turn (an option of OLMoE)."""
    sinks: bool = False
    """A learned logit per head that takes part in the softmax and has no value (gpt-oss)."""
    attention_bias: bool = False
    """Biases on the q, k and v projections."""
    output_bias: bool | None = None
    """Bias on the o projection; None means as attention_bias says."""
    attention_gate: Literal["none", "head", "element"] = "none"
    """Whether what attention gives is multiplied, before the o projection, by the sigmoid of a projection of what the
    layer reads: a number per head, or one per coordinate (Qiu et al. 2025)."""

    activation: Activation = "silu"
    """Of the feed-forward layer."""
    gated: bool = True
    """Whether it multiplies a second projection, as SwiGLU and GeGLU do."""
    mlp_bias: bool = False
    """Biases on the feed-forward projections."""

    mixers: tuple[Mixer, ...] | None = None
    """What mixes the tokens in each layer; None means attention in all, latent attention where it has sizes."""
    feed_forwards: tuple[FeedForwardKind, ...] | None = None
    """The feed-forward of each layer; None means experts in all where there are experts, dense ones where not."""
    latent: LatentConfig = LatentConfig()
    """Of layers with latent attention."""
    mamba: MambaConfig = MambaConfig()
    """Of state-space layers."""
    experts: ExpertsConfig = ExpertsConfig()
    """Of layers with a mixture of experts."""
    head: HeadConfig = HeadConfig()
    """What the model ends in."""

    mtp: int = 0
    """Further tokens that training predicts at each position, by a layer each (DeepSeek-V3)."""
    mtp_mixer: Mixer | None = None
    """What mixes the tokens in such layers; None means as the model's last layer does (DeepSeek-V3)."""
    mtp_feed_forward: FeedForwardKind | None = None
    """Their feed-forward, likewise."""

    init_std: float = 0.02
    """Standard deviation of the weights' normal init."""
    embed_init_std: float | None = None
    """The same for the embedding; None means init_std."""
    depth_scaled_init: bool = False
    """Whether what adds to the residual stream (o, down) starts smaller by (2 L) ** -0.5 (GPT-2)."""

    def resolved(self) -> "ModelConfig":
        """The same with all that follows from other fields filled in (heads, sizes, sights, scales).

        Raises UserError for values that no decoder can have.
        """
        for name in POSITIVE:
            value = getattr(self, name)
            if value is None or not 1 <= value < 2**31:
                raise UserError(f"model.{name} is {value}, it has to be a positive number that fits 32 bits")
        for name, fewest in (("num_layers", 1), ("mtp", 0)):
            if not fewest <= getattr(self, name) <= MOST_LAYERS:
                raise UserError(f"model.{name} is {getattr(self, name)}, it has to be from {fewest} to {MOST_LAYERS}")
        if self.mtp:
            self.check_predicts(f"model.mtp={self.mtp}")
        for name in ("norm_eps", "init_std", "embed_init_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"model.{name} is {value}, it has to be a number of at least 0")
        for name in MULTIPLIERS:
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"model.{name} is {getattr(self, name)}, it has to be a finite number")
        for name in POSITIVE_OR_NONE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"model.{name} is {value}, it has to be a positive number")
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise UserError(f"model.num_kv_heads={kv_heads} does not divide model.num_heads={self.num_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}")
        head_dim = self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim
        if not 1 <= head_dim < 2**31:
            raise UserError(f"model.head_dim is {head_dim}, it has to be a positive number that fits 32 bits")
        if self.qk_norm == "plain" and self.positions != "rope":
            raise UserError(f"model.qk_norm=plain is for model.positions=rope, which is {self.positions}")
        if self.query_growth is None and self.query_growth_every != ModelConfig.query_growth_every:
            raise UserError("model.query_growth_every says nothing without model.query_growth")
        if self.residual_normed and (self.norm_at != "pre" or self.parallel != "no"):
            raise UserError("model.residual_normed needs model.norm_at=pre and model.parallel=no")
        self.head.check()
        mixers, feed_forwards = self._mixers(), self._feed_forwards()
        if self.prefix_lm:
            self.check_prefix()
            self.check_predicts("model.prefix_lm")
            if self.mtp:
                raise UserError("model.prefix_lm has no layers for further tokens (model.mtp), which see one side only")
        return replace(
            self,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            sights=self._sights(),
            mixers=mixers,
            feed_forwards=feed_forwards,
            mtp_mixer=self._of_further("mtp_mixer", mixers),
            mtp_feed_forward=self._of_further("mtp_feed_forward", feed_forwards),
            experts=self._experts(),
            rope_dim=self._rope_dim(head_dim),
            rope_layers=self._rope_layers(),
            embed_init_std=self.init_std if self.embed_init_std is None else self.embed_init_std,
            output_bias=self.attention_bias if self.output_bias is None else self.output_bias,
        )

    def without_further(self) -> "ModelConfig":
        """The same without layers for further tokens."""
        return replace(self, mtp=0, mtp_mixer=None, mtp_feed_forward=None)

    def cut_sizes(self) -> dict[str, int]:
        """Sizes that a mesh has to divide, by logical axes. Without a vocabulary where that is not known yet.

        Of several widths of feed-forward layers it is their greatest common divisor.
        """
        sizes: dict[str, int] = {}
        if self.mixers is None or "attention" in self.mixers:
            sizes |= {"heads": self.num_heads, "kv_heads": self.num_kv_heads or self.num_heads}
        if self.latent.kv_rank:
            sizes["heads"] = self.num_heads
        kinds = self._feed_forwards()
        widths = [self.intermediate_size] if "dense" in kinds else []
        if "experts" in kinds:
            widths += [self.experts.intermediate_size or self.intermediate_size, self.experts.shared_size]
        if widths:
            sizes["mlp"] = math.gcd(*widths)
        if self.mamba.inner_size:
            sizes["inner"] = self.mamba.inner_size
        if self.mamba.num_heads:
            sizes["ssm_heads"] = self.mamba.num_heads
        return sizes if self.vocab_size is None else {**sizes, "vocab": self.vocab_size}

    def check_predicts(self, what: str) -> None:
        """Raises UserError for a model that gives no logits of next tokens, which `what` asks for."""
        if not self.causal:
            raise UserError(f"{what} needs a model that predicts next tokens; an encoder (model.causal=False) does not")
        if self.head.labels is not None:
            raise UserError(
                f"{what} needs a model that predicts next tokens; this one ends in scores "
                f"(model.head.labels={self.head.labels})"
            )

    def check_prefix(self) -> None:
        """Raises UserError for a model whose layers see to both sides anyway, or cannot."""
        if not self.causal or set(self._mixers()) & {"mamba", "mamba2"}:
            raise UserError("a prefix is for causal attention in all layers")

    def check_visible(self) -> None:
        """Raises UserError for a model whose documents cannot share their first tokens within a row."""
        if not self.causal or self.prefix_lm or set(self._mixers()) & {"mamba", "mamba2"}:
            raise UserError("documents share their first tokens where all layers attend, to what comes before alone")
        scaling = self.rope_scaling
        if scaling is not None and scaling.by_length:
            raise UserError(
                f"model.rope_scaling.kind={scaling.kind} turns a document's first tokens by its whole length"
            )

    def _mixers(self) -> tuple[Mixer, ...]:
        default: Mixer = "latent" if self.latent.kv_rank else "attention"
        mixers = (default,) * self.num_layers if self.mixers is None else self.mixers
        if len(mixers) != self.num_layers:
            raise UserError(f"model.mixers has {len(mixers)} entries for model.num_layers={self.num_layers}")
        if {"mamba", "mamba2"} <= set(mixers):
            raise UserError("model.mixers has both mamba and mamba2; model.mamba says one of them")
        if "mamba" in mixers or "mamba2" in mixers:
            self.mamba.check(heads="mamba2" in mixers)
        elif self.mamba != MambaConfig():
            raise UserError("model.mamba is of layers that model.mixers does not have")
        if "latent" in mixers:
            self._check_latent()
        elif self.latent != LatentConfig():
            raise UserError("model.latent is of layers that model.mixers does not have")
        if not self.causal and set(mixers) - {"attention", "none"}:
            raise UserError(f"model.causal=False needs attention in all layers, and model.mixers={','.join(mixers)}")
        return mixers

    def _check_latent(self) -> None:
        self.latent.check()
        for name, wanted in LATENT_ONLY.items():
            if getattr(self, name) != wanted:
                raise UserError(f"model.{name}={getattr(self, name)!r}: latent attention has {wanted!r} only")
        if self.head_dim != self.latent.rope_dim or self.sights is not None and set(self.sights) != {"full"}:
            raise UserError("latent attention needs model.head_dim=model.latent.rope_dim, and full model.sights")

    def _feed_forwards(self) -> tuple[FeedForwardKind, ...]:
        kinds = self.feed_forwards
        if kinds is None:
            kinds = (("experts" if self.experts.num else "dense"),) * self.num_layers
        if len(kinds) != self.num_layers:
            raise UserError(f"model.feed_forwards has {len(kinds)} entries for model.num_layers={self.num_layers}")
        if "none" in kinds and self.parallel != "no":
            raise UserError(f"model.parallel={self.parallel} needs a feed-forward in every layer")
        if ("experts" in kinds) != (self.experts.num > 0):
            raise UserError(f"model.feed_forwards={','.join(kinds)} does not go with experts.num={self.experts.num}")
        return kinds

    def _of_further(self, name: str, kinds: tuple[str, ...]) -> Any:
        kind = getattr(self, name)
        if kind is None:
            return kinds[-1] if self.mtp else None
        if not self.mtp:
            raise UserError(f"model.{name}={kind} says nothing without model.mtp")
        if kind not in kinds:
            raise UserError(f"model.{name}={kind} is of no layer of the model, which has {', '.join(sorted({*kinds}))}")
        return kind

    def _experts(self) -> ExpertsConfig:
        self.experts.check()
        if self.experts.limit is not None and (self.activation != "silu" or not self.gated):
            raise UserError("model.experts.limit needs model.activation=silu and model.gated")
        if not self.experts.num or self.experts.intermediate_size is not None:
            return self.experts
        return replace(self.experts, intermediate_size=self.intermediate_size)

    def _sights(self) -> tuple[Sight, ...]:
        sights = self.sights
        if sights is None:
            sights = (("full" if self.window is None else "sliding"),) * self.num_layers
        if len(sights) != self.num_layers:
            raise UserError(f"model.sights has {len(sights)} entries for model.num_layers={self.num_layers}")
        for name, sight in (("window", "sliding"), ("chunk", "chunked")):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise UserError(f"model.{name} is {value}, it has to be a positive number or None")
            if value is None and sight in sights:
                raise UserError(f"model.sights: layer {sights.index(sight)} is {sight}, and model.{name} is None")
        return sights

    def _rope_dim(self, head_dim: int) -> int | None:
        if self.positions != "rope":
            for name in ("rope_scaling", "rope_dim", "rope_layers", "local_rope_theta"):
                if getattr(self, name) is not None:
                    raise UserError(f"model.{name} is for model.positions=rope, which is {self.positions}")
            return None
        dim = head_dim if self.rope_dim is None else self.rope_dim
        if not 2 <= dim <= head_dim or dim % 2:
            name = "head_dim" if self.rope_dim is None else "rope_dim"
            raise UserError(f"model.{name} is {dim}, rotary positions need an even number of at most {head_dim}")
        if self.rope_scaling is not None:
            self.rope_scaling.check(dim // 2)
        return dim

    def _rope_layers(self) -> tuple[bool, ...] | None:
        if self.positions != "rope":
            return None
        layers = (True,) * self.num_layers if self.rope_layers is None else self.rope_layers
        if len(layers) != self.num_layers:
            raise UserError(f"model.rope_layers has {len(layers)} entries for model.num_layers={self.num_layers}")
        return layers
