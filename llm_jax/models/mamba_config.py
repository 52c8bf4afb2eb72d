"""State-space layers as plain fields."""

import math
from dataclasses import dataclass
from typing import Literal

from llm_jax.base.errors import UserError


@dataclass(frozen=True)
class MambaConfig:
    """Mamba and Mamba-2 layers of a model; the defaults mean that it has none."""

    inner_size: int = 0
    """I, channels of the scan; 0 means no such layers."""
    state_size: int = 0
    """N, numbers that a channel remembers."""
    conv_width: int = 4
    """K, tokens that the short convolution sees, the token itself included."""
    conv_bias: bool = True
    """Bias of the convolution."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """After the convolution; the gate is silu's always."""
    bias: bool = False
    """Biases on the projections in and out."""
    dt_rank: int = 0
    """R, width through which Mamba makes its step sizes; 0 in Mamba-2."""
    num_heads: int = 0
    """H, heads of Mamba-2, of I / H channels each; 0 in Mamba."""
    num_groups: int = 1
    """G, groups of heads of Mamba-2 that share B and C and are normed together."""
    selection_norm: Literal["none", "plain", "weighted"] = "none"
    """RMSNorm of what Mamba's steps, B and C are made of: without weights (Falcon-Mamba) or with (Jamba)."""
    norm_eps: float = 1e-5
    """Added to the mean square inside those norms and the gated norm of Mamba-2."""
    dt_min: float = 0.0
    """Step sizes are at least this."""
    dt_max: float | None = None
    """Step sizes are at most this; None means any."""
    chunk_size: int | None = None
    """Tokens of a chunk of the scan, which changes no number; None leaves it to the kernel."""
    dt_init_min: float = 1e-3
    """Step sizes start log-uniform between this …"""
    dt_init_max: float = 0.1
    """… and this, …"""
    dt_init_floor: float = 1e-4
    """… and at least this."""

    @property
    def head_dim(self) -> int:
        """P, channels of a head of Mamba-2."""
        return self.inner_size // self.num_heads

    def check(self, heads: bool) -> None:
        """Raises UserError for values that no Mamba layer (`heads`: no Mamba-2 layer) can have."""
        positive = ["inner_size", "state_size", "conv_width", *(("num_heads", "num_groups") if heads else ("dt_rank",))]
        for name in positive:
            if not 1 <= getattr(self, name) < 2**31:
                raise UserError(f"model.mamba.{name} is {getattr(self, name)}, it has to be a positive number")
        if heads and self.inner_size % self.num_heads:
            raise UserError(f"model.mamba.num_heads={self.num_heads} does not divide inner_size={self.inner_size}")
        if heads and self.num_heads % self.num_groups:
            raise UserError(f"model.mamba.num_groups={self.num_groups} does not divide num_heads={self.num_heads}")
        if heads and self.selection_norm != "none":
            raise UserError(f"model.mamba.selection_norm={self.selection_norm}: Mamba-2 has none")
        if not 0 <= self.norm_eps < math.inf:
            raise UserError(f"model.mamba.norm_eps is {self.norm_eps}, it has to be a number of at least 0")
        if not 0 <= self.dt_min < (math.inf if self.dt_max is None else self.dt_max):
            raise UserError(f"model.mamba.dt_min={self.dt_min} has to be at least 0 and below dt_max={self.dt_max}")
        if self.chunk_size is not None and not 1 <= self.chunk_size <= 256:
            raise UserError(f"model.mamba.chunk_size is {self.chunk_size}, it has to be between 1 and 256, or None")
        if not 0 < self.dt_init_min <= self.dt_init_max < math.inf or not 0 < self.dt_init_floor < math.inf:
            raise UserError("model.mamba.dt_init_min, dt_init_max, dt_init_floor have to be positive and in order")
