"""What a call of `decode_attention` asks for."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DecodeSpec:
    """The static part of a call."""

    batch: int
    slots: int
    heads: int
    kv_heads: int
    dtype: str
    scale: float
    softcap: float | None

    @property
    def group(self) -> int:
        """Query heads per key and value head."""
        return self.heads // self.kv_heads


class Extras(NamedTuple):
    """Arrays that a call may come with, each None where it doesn't."""

    starts: Int[Array, " B"] | None
    alibi_slopes: Float[Array, " N"] | None
    sinks: Float[Array, " N"] | None


def decode_attention_spec(
    q: Any,
    k: Any,
    v: Any,
    lengths: Any,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    starts: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
) -> DecodeSpec:
    """Checks a call, arguments as for `decode_attention`; raises ArgumentError."""
    if len(q.shape) != 3 or len(k.shape) != 4 or len(v.shape) != 4:
        raise _error(f"q must be [B, N, H], k and v [B, K, S, H]; got {q.shape}, {k.shape}, {v.shape}")
    (B, N, H), (K, S) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != H:
        raise _error(f"k {k.shape} must be [{B}, K, S, {H}] to go with q {q.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise _error(f"v {v.shape} must agree with k {k.shape} in all but the last axis")
    if N % K:
        raise _error(f"k has {K} heads, which do not divide the {N} heads of q")
    dtype = jnp.dtype(q.dtype).name
    if dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise _error(f"q, k, v must share one dtype of {', '.join(FLOATS)}; got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, value in (("lengths", lengths), ("starts", starts)):
        if value is not None and (value.shape != (B,) or not jnp.issubdtype(value.dtype, jnp.integer)):
            raise _error(f"{name} must be integers [{B}]; got {value.dtype}{list(value.shape)}")
    for name, value in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if value is not None and value.shape != (N,):
            raise _error(f"{name} {value.shape} must be [{N}], one per query head")
    if softcap is not None and not softcap > 0:
        raise _error(f"softcap={softcap!r} must be positive or None")
    return DecodeSpec(B, S, N, K, dtype, H**-0.5 if scale is None else float(scale), softcap)


def transformed(
    spec: DecodeSpec, scores: Float[Array, "B K G S"], lengths: Int[Array, " B"], extras: Extras
) -> Float[Array, "B K G S"]:
    """Scaled scores as they go into the softmax: capped, with ALiBi's bias, -inf where a slot is not seen."""
    heads = (spec.kv_heads, spec.group, 1)
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    slots, lengths = jnp.arange(spec.slots), lengths[:, None, None, None]
    if extras.alibi_slopes is not None:
        scores -= extras.alibi_slopes.astype(jnp.float32).reshape(heads) * (lengths - 1 - slots)
    seen = slots < lengths
    if extras.starts is not None:
        seen &= slots >= extras.starts[:, None, None, None]
    return jnp.where(seen, scores, -jnp.inf)


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"decode_attention: {text}")
