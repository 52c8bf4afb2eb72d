"""What comes before the last projection of models that have more than one there."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from llm_jax.models.config import ModelConfig
from llm_jax.models.feed_forward import ACTIVATIONS
from llm_jax.models.layers import Linear
from llm_jax.models.norms import make_norm


class Transform(nnx.Module):
    """`norm(act(dense(x)))`, the masked-language-model head of BERT (Devlin et al. 2018, arXiv:1810.04805) and
    ModernBERT (Warner et al. 2024, arXiv:2412.13663) up to its last projection."""

    def __init__(self, config: ModelConfig):
        D, head = config.hidden_size, config.head
        self.dense = Linear(D, D, ("embed", "embed"), bias=head.transform_bias, std=config.init_std)
        self.norm = make_norm(config)
        self.activation = head.transform_activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))
