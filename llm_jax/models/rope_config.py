"""How rotary angles go on beyond the trained length. Standard library only."""

import math
from dataclasses import dataclass
from typing import Literal

from llm_jax.base.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Rotary angles beyond the trained length; which fields count depends on the kind."""

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: float = 1.0
    """How many times the trained length."""
    original_length: int | None = None
    """`original_max_position_embeddings`: the trained length, in tokens (yarn, llama3, longrope)."""
    attention_factor: float | None = None
    """Multiplies queries and keys (yarn, longrope); None takes the paper's formula."""
    beta_fast: float = 32.0
    """Turns in the trained length above which yarn keeps a frequency."""
    beta_slow: float = 1.0
    """Turns in the trained length below which yarn interpolates."""
    mscale: float | None = None
    """DeepSeek's weight of the logarithm in yarn's attention factor."""
    mscale_all_dim: float | None = None
    """The same in its denominator."""
    truncate: bool = True
    """Whether yarn rounds the range between kept and interpolated to whole pairs."""
    low_freq_factor: float = 1.0
    """Turns below which llama3 stretches."""
    high_freq_factor: float = 4.0
    """Turns above which llama3 keeps a frequency."""
    short_factor: tuple[float, ...] = ()
    """Of longrope, one per pair, up to the trained length."""
    long_factor: tuple[float, ...] = ()
    """Of longrope beyond it."""

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long the document is."""
        return self.kind in ("dynamic", "longrope")

    def check(self, pairs: int) -> None:
        """Raises UserError for values that give no angles. `pairs`: how many turn in a head."""
        where = f"model.rope_scaling ({self.kind})"
        if not 0 < self.factor < math.inf:
            raise UserError(f"{where}: factor is {self.factor}, it has to be a positive number")
        if self.kind in ("yarn", "llama3", "longrope") and (self.original_length is None or self.original_length < 2):
            raise UserError(f"{where}: original_length is {self.original_length}, it has to be at least 2")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise UserError(f"{where}: beta_slow={self.beta_slow} has to be in (0, beta_fast={self.beta_fast}]")
        if self.kind == "llama3" and not 0 < self.low_freq_factor <= self.high_freq_factor:
            raise UserError(
                f"{where}: low_freq_factor={self.low_freq_factor} has to be in (0, high_freq_factor="
                f"{self.high_freq_factor}]"
            )
        if self.kind == "dynamic" and pairs < 2:
            raise UserError(f"{where}: needs at least 2 pairs of coordinates that turn")
        if self.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = getattr(self, name)
                if len(factors) != pairs or not all(0 < x < math.inf for x in factors):
                    raise UserError(f"{where}: {name} has to be {pairs} positive numbers, one per pair that turns")
