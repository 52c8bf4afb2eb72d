"""A mixture of experts as plain fields."""

import math
from dataclasses import dataclass
from typing import Literal

from llm_jax.base.errors import UserError


@dataclass(frozen=True)
class ExpertsConfig:
    num: int = 0
    """E, routed experts of a layer; 0 means that there are none and the feed-forward is dense."""
    top_k: int = 2
    """Experts that a token is sent to."""
    intermediate_size: int | None = None
    """Width of one expert; None means the model's."""
    bias: bool = False
    """Biases on the experts' projections."""
    limit: float | None = None
    """Of gpt-oss: gate is cut at this, up at ± this; an expert then gives (up + 1) gate sigmoid(alpha gate)."""
    alpha: float = 1.702
    """Where there is a limit."""
    latent_size: int | None = None
    """Width that tokens are projected to before the experts, and back from after (Nemotron-H); None means no such."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How logits of the router become scores, from which experts are chosen and weighted."""
    normalize: bool = True
    """Whether the weights of the chosen experts are divided by their sum. Of softmax scores that is the softmax over
    the chosen logits: normalizing before the choice or after it are one."""
    scale: float = 1.0
    """Multiplies the weights (`routed_scaling_factor`)."""
    weigh: Literal["output", "input"] = "output"
    """What the weights multiply: what comes out of an expert, or what goes in (Llama 4)."""
    router_bias: bool = False
    """Bias on the router's logits."""
    correction_bias: bool = False
    """A bias on scores that takes part in the choice only, moved by load (DeepSeek-V3), not by gradients."""
    groups: int = 1
    """Groups of neighbouring experts; the choice is made within the best `top_groups` of them."""
    top_groups: int = 1
    """Groups that a token's experts may be of."""
    group_score: Literal["max", "top2"] = "max"
    """Of a group: its best score (DeepSeek-V2), or the sum of its two best (DeepSeek-V3)."""
    noisy: bool = False
    """Noise of learned size on the logits in training (Shazeer et al. 2017)."""

    shared_size: int = 0
    """Width of the shared experts together, which every token passes; 0 means none."""
    shared_gate: bool = False
    """Whether what they give is multiplied by a sigmoid of the token (Qwen2-MoE)."""

    capacity_factor: float | None = None
    """None: no token is dropped. Otherwise an expert takes at most ceil(factor T top_k / E) tokens of a row of T, first
    choices first, and drops the others (Switch; GShard)."""

    def check(self) -> None:
        """Raises UserError for values that no layer can have."""
        if self.num == 0:
            if self != ExpertsConfig():
                raise UserError("model.experts.num is 0, so no other field of model.experts may be set")
            return
        for name in ("num", "top_k", "groups", "top_groups", "intermediate_size", "latent_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise UserError(f"model.experts.{name} is {value}, it has to be a positive number that fits 32 bits")
        if not 0 <= self.shared_size < 2**31:
            raise UserError(f"model.experts.shared_size is {self.shared_size}, it has to be a number that fits 32 bits")
        for name in ("limit", "alpha", "scale", "capacity_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"model.experts.{name} is {value}, it has to be a positive number")
        if self.num % self.groups:
            raise UserError(f"model.experts.groups={self.groups} does not divide model.experts.num={self.num}")
        if self.top_groups > self.groups:
            raise UserError(f"model.experts.top_groups={self.top_groups} of model.experts.groups={self.groups}")
        in_groups = self.num // self.groups
        if self.group_score == "top2" and in_groups < 2:
            raise UserError("model.experts.group_score=top2 needs groups of at least 2 experts")
        if self.top_k > in_groups * self.top_groups:
            raise UserError(
                f"model.experts.top_k={self.top_k} of {in_groups * self.top_groups} experts to choose from "
                f"(num={self.num}, groups={self.groups}, top_groups={self.top_groups})"
            )
        if self.noisy and (self.scores != "softmax" or not self.normalize or self.top_k == self.num):
            raise UserError("model.experts.noisy needs scores=softmax, normalize and top_k below num")
        if self.noisy and (self.correction_bias or self.groups > 1):
            raise UserError("model.experts.noisy goes with neither correction_bias nor groups")
        if self.shared_gate and not self.shared_size:
            raise UserError("model.experts.shared_gate needs shared experts (shared_size)")
        if self.weigh == "input" and self.bias:
            raise UserError("model.experts.weigh=input with bias: an expert of weight 0 would not give 0")
