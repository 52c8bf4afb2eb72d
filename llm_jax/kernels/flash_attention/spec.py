"""What a call of `flash_attention` asks for: its static part, its mask arrays, and who sees whom."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class AttentionSpec:
    """The static part of a call. Implementations are chosen and compiled by it."""

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    scale: float
    causal: bool
    window: int | None
    chunk: int | None
    softcap: float | None
    alibi: bool
    sinks: bool
    segments: bool
    positions: bool
    ranges: bool
    dropout: float = 0.0
    """Share of the weights that is dropped."""

    @property
    def row_sums(self) -> int:
        """How many `RowSums` the backward pass makes."""
        return 3 if self.alibi else 1 if self.sinks else 0

    @property
    def group(self) -> int:
        """Query heads per key and value head."""
        return self.heads // self.kv_heads


class MaskArrays(NamedTuple):
    """The part of the mask that is data; what is None does not restrict."""

    q_segments: Int[Array, "B T"] | None = None
    kv_segments: Int[Array, "B S"] | None = None
    q_positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None
    kv_ranges: Int[Array, "B T 2"] | None = None


class RowSums(NamedTuple):
    """Sums over the keys, float32, for gradients of slopes and sinks; p are probabilities, dp their gradients.

    These gradients are few numbers, sums in which it would show that the saved output, of which sum(p dp) could be
    made, is rounded.
    """

    gradient: Float[Array, "B T N"]
    """p dp."""
    biased_gradient: Float[Array, "B T N"] | None = None
    """p dp b, with b the bias of a slope of 1. Where there are slopes."""
    bias: Float[Array, "B T N"] | None = None
    """p b. Where there are slopes."""


class Rows(NamedTuple):
    """One side of a rectangle of the mask: indices, positions, segments that broadcast against the other side's."""

    index: Array
    position: Array
    segment: Array | None
    start: Array | None = None
    end: Array | None = None


def attention_spec(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    segment_ids: Any = None,
    q_positions: Any = None,
    kv_positions: Any = None,
    kv_ranges: Any = None,
    dropout_rate: float = 0.0,
    dropout_keys: Any = None,
    return_lse: bool = False,
) -> AttentionSpec:
    """Checks shapes, dtypes and options of a call, arguments as for `flash_attention`; raises ArgumentError."""
    del return_lse  # every implementation computes it
    if not (len(q.shape) == len(k.shape) == len(v.shape) == 4):
        raise _error(f"q, k, v must be [B, length, heads, size]; got {q.shape}, {k.shape}, {v.shape}")
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != H:
        raise _error(f"k {k.shape} must be [{B}, S, K, {H}] to go with q {q.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise _error(f"v {v.shape} must agree with k {k.shape} in all but the last axis")
    if 0 in q.shape or 0 in v.shape:
        raise _error(f"q, k, v must not be empty; got {q.shape}, {k.shape}, {v.shape}")
    if N % K:
        raise _error(f"k has {K} heads, which do not divide the {N} heads of q")
    dtype = jnp.dtype(q.dtype).name
    if dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise _error(f"q, k, v must share one dtype of {', '.join(FLOATS)}; got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, value in (("window", window), ("chunk", chunk)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise _error(f"{name}={value!r} must be a positive int or None")
    if softcap is not None and not softcap > 0:
        raise _error(f"softcap={softcap!r} must be positive or None")
    if not 0 <= dropout_rate < 1:
        raise _error(f"dropout_rate={dropout_rate!r} must be in [0, 1)")
    if (dropout_rate > 0) != (dropout_keys is not None):
        raise _error(f"dropout_rate={dropout_rate!r} and dropout_keys go together")
    if dropout_keys is not None and dropout_keys.shape != (B, N, 2):
        raise _error(f"dropout_keys {dropout_keys.shape} must be [{B}, {N}, 2], a key's data per row and query head")
    for name, value in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if value is not None and value.shape != (N,):
            raise _error(f"{name} {value.shape} must be [{N}], one per query head")
    if kv_positions is not None and q_positions is None:
        raise _error("kv_positions needs q_positions: there is no default for one without the other")
    if isinstance(segment_ids, tuple):
        if len(segment_ids) != 2:
            raise _error("segment_ids as a tuple must be (of queries, of keys)")
        q_segments, kv_segments = segment_ids
    else:
        q_segments = kv_segments = segment_ids
        if segment_ids is not None and T != S:
            raise _error(f"segment_ids must be a (queries, keys) pair where lengths differ ({T}, {S})")
    arrays = (
        ("segment_ids", q_segments, ((B, T),)),
        ("segment_ids", kv_segments, ((B, S),)),
        ("q_positions", q_positions, ((B, T),)),
        ("kv_positions", kv_positions, ((B, S),)),
        ("kv_ranges", kv_ranges, ((B, T, 2), (B, 2))),
    )
    for name, value, shapes in arrays:
        if value is not None and (value.shape not in shapes or not jnp.issubdtype(value.dtype, jnp.integer)):
            wanted = " or ".join(str(list(s)) for s in shapes)
            raise _error(f"{name} must be integers {wanted}; got {value.dtype}{list(value.shape)}")
    return AttentionSpec(
        batch=B,
        q_len=T,
        kv_len=S,
        heads=N,
        kv_heads=K,
        head_dim=H,
        value_dim=v.shape[3],
        dtype=dtype,
        scale=H**-0.5 if scale is None else float(scale),
        causal=causal,
        window=window,
        chunk=chunk,
        softcap=softcap,
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
        segments=segment_ids is not None,
        positions=q_positions is not None,
        ranges=kv_ranges is not None,
        dropout=float(dropout_rate),
    )


def mask_arrays(
    spec: AttentionSpec,
    segment_ids: Any = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    kv_ranges: Array | None = None,
) -> MaskArrays:
    """The mask arrays of a checked call, as int32, in their full shapes."""
    q_segments, kv_segments = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if kv_ranges is not None and kv_ranges.ndim == 2:
        kv_ranges = jnp.broadcast_to(kv_ranges[:, None], (spec.batch, spec.q_len, 2))
    arrays = (q_segments, kv_segments, q_positions, kv_positions, kv_ranges)
    return MaskArrays(*(None if x is None else jnp.asarray(x, jnp.int32) for x in arrays))


def visible(spec: AttentionSpec, q: Rows, kv: Rows) -> Bool[Array, "..."] | None:
    """Which keys each query sees, for the rectangle that the two sides broadcast to; None if nothing restricts.

    With i and j the positions of query and key: causal, j <= i; window, i - window < j (and j < i + window where not
    causal); chunk, i and j in the same chunk of that many positions; segments, equal and not 0 (0 is padding);
    ranges, the key's index (not its position) in [start, end).
    """
    conditions = []
    if spec.causal:
        conditions.append(kv.position <= q.position)
    if spec.window is not None:
        conditions.append(kv.position > q.position - spec.window)
        if not spec.causal:
            conditions.append(kv.position < q.position + spec.window)
    if spec.chunk is not None:
        conditions.append(kv.position // spec.chunk == q.position // spec.chunk)
    if q.segment is not None and kv.segment is not None:
        conditions.append((q.segment == kv.segment) & (kv.segment != 0))
    if q.start is not None and q.end is not None:
        conditions.append((q.start <= kv.index) & (kv.index < q.end))
    mask = None
    for condition in conditions:
        mask = condition if mask is None else mask & condition
    return mask


def may_hold_unseen(spec: AttentionSpec) -> bool:
    """Whether there can be keys that no query sees, or queries that see no key: their content must not matter."""
    return spec.segments or spec.positions or spec.ranges or spec.q_len != spec.kv_len


def alibi_bias(slopes: Float[Array, "..."], q: Rows, kv: Rows) -> Float[Array, "..."]:
    """-slope · |i - j| (Press et al. 2021, https://arxiv.org/abs/2108.12409), symmetric where not causal."""
    return -slopes * jnp.abs(q.position - kv.position).astype(jnp.float32)


def first_position(spec: AttentionSpec) -> int:
    """Default position of query 0: queries are aligned with the last keys."""
    return spec.kv_len - spec.q_len


def precision(dtype: Any) -> jax.lax.Precision:
    """float32 in means float32 arithmetic, on every backend."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"flash_attention: {text}")
