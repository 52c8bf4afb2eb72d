"""What a call of `causal_conv1d` asks for."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ConvSpec:
    """The static part of a call."""

    batch: int
    length: int
    channels: int
    width: int
    dtype: str
    silu: bool


def conv_spec(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    activation: Literal["silu"] | None = None,
    segment_ids: Any = None,
    initial_state: Any = None,
    return_final_state: bool = False,
) -> ConvSpec:
    """Checks a call, arguments as for `causal_conv1d`; raises ArgumentError."""
    if len(x.shape) != 3 or len(weight.shape) != 2 or weight.shape[1] != x.shape[2] or weight.shape[0] < 1:
        raise _error(f"x must be [B, T, D] and weight [K, D]; got {x.shape}, {weight.shape}")
    (B, T, D), K = x.shape, weight.shape[0]
    if T < 1:
        raise _error("x has no tokens")
    dtype = jnp.dtype(x.dtype).name
    if dtype not in FLOATS:
        raise _error(f"x must be one of {', '.join(FLOATS)}; got {x.dtype}")
    if bias is not None and bias.shape != (D,):
        raise _error(f"bias {bias.shape} must be [{D}]")
    if activation not in (None, "silu"):
        raise _error(f"activation={activation!r} must be 'silu' or None")
    if segment_ids is not None and (segment_ids.shape != (B, T) or not jnp.issubdtype(segment_ids.dtype, jnp.integer)):
        raise _error(f"segment_ids must be integers [{B}, {T}]; got {segment_ids.dtype}{list(segment_ids.shape)}")
    if initial_state is not None and initial_state.shape != (B, K - 1, D):
        raise _error(f"initial_state {initial_state.shape} must be [{B}, {K - 1}, {D}]")
    return ConvSpec(B, T, D, K, dtype, activation == "silu")


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"causal_conv1d: {text}")
