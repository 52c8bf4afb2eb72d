"""What a model ends in: logits of the vocabulary, or scores."""

from dataclasses import dataclass
from typing import Literal

from llm_jax.base.errors import UserError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Pooling = Literal["last", "first", "mean", "none"]
"""What scores are of: a document's last token, its first, the mean of its tokens; or each token has its own."""


@dataclass(frozen=True)
class HeadConfig:
    labels: int | None = None
    """How many scores a text or token gets in place of the vocabulary's logits; None keeps these."""
    pooling: Pooling = "last"
    """What the scores are of."""
    bias: bool = False
    """Bias on the logits or scores."""
    transform: bool = False
    """Whether a projection, an activation and a norm come before the last projection (BERT, ModernBERT)."""
    transform_bias: bool = False
    """Bias on that projection."""
    transform_activation: Activation = "gelu"
    """Its activation."""

    def check(self) -> None:
        """Raises UserError for values that no model can have."""
        if self.labels is None and self.pooling != "last":
            raise UserError(f"model.head.pooling={self.pooling} is of scores, and model.head.labels is None")
        if self.labels is not None and not 1 <= self.labels < 2**31:
            raise UserError(f"model.head.labels is {self.labels}, it has to be a positive number or None")
        if not self.transform and (self.transform_bias or self.transform_activation != "gelu"):
            raise UserError("model.head.transform_bias and transform_activation are for model.head.transform")
