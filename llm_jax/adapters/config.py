"""The fields of a LoRA adapter, by PEFT's names."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LoraConfig:
    r: int = 8
    """Rank of the update of each matrix."""
    lora_alpha: float = 8.0
    """The update is scaled by lora_alpha / r."""
    target_modules: tuple[str, ...] | str | None = "all-linear"
    """Modules by their names in transformers: all-linear, full names or endings, or one regular expression."""
    exclude_modules: tuple[str, ...] | str | None = None
    """Modules that are left out all the same, by full names or endings, or one regular expression."""
    target_parameters: tuple[str, ...] | None = None
    """Parameters by full names or endings, for what is no linear module: mlp.experts.gate_up_proj."""
    use_rslora: bool = False
    """Scales by lora_alpha / sqrt(r) (rsLoRA)."""
    use_dora: bool = False
    """Learns the length of each output's weights apart from their direction (DoRA)."""
    lora_dropout: float = 0.0
    """Share of the update's inputs that is dropped, in training only."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "pissa", "olora"] = True
    """True: A as torch's Linear, B zero; gaussian: A normal with deviation 1 / r; False: both as torch's Linear;
    orthogonal; pissa and olora: from the weight's singular or QR decomposition."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another r for the modules whose names end as a regular expression; the first that matches."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Another lora_alpha, likewise."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Numbers of the layers that are adapted; None means all. Not for target_modules as one regular expression."""
    layers_pattern: tuple[str, ...] | str | None = None
    """What stands before a layer's number in a module's name; None means anything."""
    modules_to_save: tuple[str, ...] | None = None
    """Endings of names of modules that are trained whole and kept with the adapter."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained whole: none, all, or those of adapted modules."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: learning rate of B over that of A; None means the same for both. Not part of PEFT's files."""
