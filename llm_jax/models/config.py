"""What a decoder is made of, as plain fields. Families map a Hugging Face `config.json` to this and back."""

import math
from dataclasses import dataclass, replace

from llm_jax.base.errors import UserError

POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "max_position_embeddings",
)


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
    window: int | None = None
    """Tokens that a token sees, itself included; None means all before it. `sliding_window` of the mistral family."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = False
    """Whether the output head is the transposed embedding."""
    attention_bias: bool = False
    """Biases on the q, k, v and o projections."""
    mlp_bias: bool = False
    """Biases on the feed-forward projections."""
    init_std: float = 0.02
    """Standard deviation of the weights' normal init."""
    embed_init_std: float | None = None
    """The same for the embedding; None means init_std."""

    def resolved(self) -> "ModelConfig":
        """The same with `num_kv_heads`, `head_dim` and `embed_init_std` filled in.

        Raises UserError for sizes that no decoder can have.
        """
        for name in POSITIVE:
            value = getattr(self, name)
            if value is None or not 1 <= value < 2**31:
                raise UserError(f"model.{name} is {value}, it has to be a positive number that fits 32 bits")
        if not 0 < self.rope_theta < math.inf:
            raise UserError(f"model.rope_theta is {self.rope_theta}, it has to be a positive number")
        for name in ("norm_eps", "init_std", "embed_init_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"model.{name} is {value}, it has to be a number of at least 0")
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise UserError(f"model.num_kv_heads={kv_heads} does not divide model.num_heads={self.num_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}")
        head_dim = self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim
        if not 2 <= head_dim < 2**31 or head_dim % 2:
            raise UserError(f"model.head_dim is {head_dim}, rotary positions need an even number that fits 32 bits")
        if self.window is not None and self.window < 1:
            raise UserError(f"model.window is {self.window}, it has to be a positive number or None")
        if self.window is not None and self.family == "llama":
            raise UserError(f"model.window={self.window}: the llama family has none; take model.family=mistral")
        if self.family == "mistral" and (self.attention_bias or self.mlp_bias):
            raise UserError("model.attention_bias, model.mlp_bias: the mistral family has no biases")
        embed_std = self.init_std if self.embed_init_std is None else self.embed_init_std
        return replace(self, num_kv_heads=kv_heads, head_dim=head_dim, embed_init_std=embed_std)
