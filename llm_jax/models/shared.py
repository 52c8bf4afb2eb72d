"""What all layers of a call read: computed once."""

from typing import NamedTuple

from llm_jax.models.cache import Meta
from llm_jax.models.rope import Rotation


class Shared(NamedTuple):
    meta: Meta
    rope: Rotation | None
    """None where no layer turns its queries and keys."""
    local_rope: Rotation | None
    """Of sliding layers with a base of their own."""
