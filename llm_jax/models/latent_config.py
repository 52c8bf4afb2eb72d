"""Sizes of multi-head latent attention. Standard library only."""

from dataclasses import dataclass

from llm_jax.base.errors import UserError


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1); a `kv_rank` of 0 means none."""

    kv_rank: int = 0
    """Numbers that keys and values of all heads are made of, and what a cache keeps of a token."""
    q_rank: int | None = None
    """The same for queries; None makes them from the token's vector directly."""
    nope_dim: int = 0
    """Coordinates of a head's query and key that do not turn."""
    rope_dim: int = 0
    """Coordinates that turn, one key for all heads."""
    value_dim: int = 0
    """Coordinates of a head's value."""
    norm_eps: float = 1e-6
    """Of the norms on the two compressed vectors."""

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return self.nope_dim + self.rope_dim

    def check(self) -> None:
        """Raises UserError for sizes that no layer can have."""
        for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim", "q_rank"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise UserError(f"model.latent.{name} is {value}, it has to be a positive number")
        if self.rope_dim % 2:
            raise UserError(f"model.latent.rope_dim is {self.rope_dim}, it has to be even")
        if not self.norm_eps >= 0:
            raise UserError(f"model.latent.norm_eps is {self.norm_eps}, it has to be at least 0")
