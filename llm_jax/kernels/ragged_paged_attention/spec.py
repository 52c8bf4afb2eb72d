"""What a call of `ragged_paged_attention` asks for: its static part, its arrays, and what can be wrong with them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.kernels.choice import ArgumentError
from llm_jax.kernels.ragged_paged_attention.pages import CODES, FLOATS, Pages


@dataclass(frozen=True)
class RaggedSpec:
    """The static part of a call. Implementations are chosen and compiled by it."""

    tokens: int
    requests: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    widths: tuple[int, int]
    """Of the slots for keys and values, which may be more than their sizes; latent: of the key, twice."""
    pages: int
    page_size: int
    table: int
    """Pages per request that the tables have room for."""
    dtype: str
    page_dtype: str
    latent: bool
    scale: float
    window: int | None
    softcap: float | None
    alibi: bool
    sinks: bool
    lse: bool

    @property
    def group(self) -> int:
        """Query heads per key and value head."""
        return self.heads // self.kv_heads

    @property
    def packed(self) -> bool:
        """Whether pages hold numbers with scales."""
        return self.page_dtype in CODES


class Batch(NamedTuple):
    """Which tokens and pages belong to which request."""

    kv_lens: Int[Array, " R"]
    page_tables: Int[Array, "R M"]
    cu_q_lens: Int[Array, " R1"]


class Extras(NamedTuple):
    """Arrays that a call may come with, each None where it doesn't."""

    alibi_slopes: Float[Array, " N"] | None
    sinks: Float[Array, " N"] | None


def ragged_paged_attention_spec(
    q: Any,
    pages: Pages,
    kv_lens: Any,
    page_tables: Any,
    cu_q_lens: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
) -> RaggedSpec:
    """Checks shapes, dtypes and options of a call, arguments as for `ragged_paged_attention`; raises ArgumentError."""
    k, v = pages.k, pages.v
    if len(q.shape) != 3 or len(k.shape) != 4:
        raise _error(f"q must be [T, N, H] and pages.k [P, K, S, H]; got {q.shape}, {k.shape}")
    (T, N, H), (P, K, S) = q.shape, k.shape[:3]
    if k.shape[3] < H:
        raise _error(f"pages.k {k.shape} must be [P, K, S, {H} or more] to go with q {q.shape}")
    if N % K:
        raise _error(f"pages have {K} heads, which do not divide the {N} heads of q")
    if v is not None and (v.shape[:3] != k.shape[:3] or v.dtype != k.dtype):
        raise _error(f"pages.v {v.dtype}{list(v.shape)} must go with pages.k {k.dtype}{list(k.shape)}")
    if v is None and (K != 1 or pages.value_dim is None):
        raise _error(f"pages without v need one head, not {K}, and a value_dim, not {pages.value_dim}")
    width = H if v is None else v.shape[3]
    value_dim = width if pages.value_dim is None else pages.value_dim
    if not 0 < value_dim <= width:
        raise _error(f"pages.value_dim={value_dim} must be from 1 to the {width} numbers that are there")
    dtype, page_dtype = jnp.dtype(q.dtype).name, jnp.dtype(k.dtype).name
    if dtype not in FLOATS:
        raise _error(f"q must be one of {', '.join(FLOATS)}; got {dtype}")
    if page_dtype != dtype and page_dtype not in CODES:
        raise _error(f"pages must be of q's {dtype}, or {' or '.join(CODES)} with scales; got {page_dtype}")
    for name, scales, needed in (
        ("k_scales", pages.k_scales, page_dtype in CODES),
        ("v_scales", pages.v_scales, page_dtype in CODES and v is not None),
    ):
        if (scales is not None) != needed or (scales is not None and scales.shape != (P, K, S)):
            got = None if scales is None else scales.shape
            raise _error(f"pages.{name} must be {(P, K, S) if needed else None} for {page_dtype} pages; got {got}")
    R = kv_lens.shape[0] if len(kv_lens.shape) == 1 else -1
    arrays = (
        ("kv_lens", kv_lens, (R,)),
        ("page_tables", page_tables, (R, page_tables.shape[-1])),
        ("cu_q_lens", cu_q_lens, (R + 1,)),
    )
    for name, value, shape in arrays:
        if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.integer):
            wanted = "[R]" if R < 0 else list(shape)
            raise _error(f"{name} must be integers {wanted}; got {value.dtype}{list(value.shape)}")
    if 0 in (T, R, P, page_tables.shape[-1]):
        raise _error(f"no tokens, requests or pages: T={T}, R={R}, P={P}, {page_tables.shape[-1]} pages in a table")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise _error(f"window={window!r} must be a positive int or None")
    if softcap is not None and not softcap > 0:
        raise _error(f"softcap={softcap!r} must be positive or None")
    for name, value in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if value is not None and value.shape != (N,):
            raise _error(f"{name} {value.shape} must be [{N}], one per query head")
    return RaggedSpec(
        tokens=T,
        requests=R,
        heads=N,
        kv_heads=K,
        head_dim=H,
        value_dim=value_dim,
        widths=(k.shape[3], k.shape[3] if v is None else v.shape[3]),
        pages=P,
        page_size=S,
        table=page_tables.shape[1],
        dtype=dtype,
        page_dtype=page_dtype,
        latent=v is None,
        scale=H**-0.5 if scale is None else float(scale),
        window=window,
        softcap=softcap,
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
        lse=return_lse,
    )


def within_bounds(spec: RaggedSpec, batch: Batch) -> Batch:
    """The same batch as int32, with whatever points out of the pages or tokens moved to the nearest that is there."""
    kv_lens, page_tables, cu_q_lens = (jnp.asarray(x, jnp.int32) for x in batch)
    cu_q_lens = jax.lax.cummax(jnp.clip(cu_q_lens, 0, spec.tokens)).at[0].set(0)
    return Batch(jnp.clip(kv_lens, 0, spec.table * spec.page_size), jnp.clip(page_tables, 0, spec.pages - 1), cu_q_lens)


def check_batch(spec: RaggedSpec, kv_lens: np.ndarray, page_tables: np.ndarray, cu_q_lens: np.ndarray) -> None:
    """Raises ArgumentError where the arrays' values contradict each other or point to what is not there."""
    if cu_q_lens[0] != 0 or (np.diff(cu_q_lens) < 0).any() or cu_q_lens[-1] > spec.tokens:
        raise _error(f"cu_q_lens must go up from 0 to at most {spec.tokens} tokens; got {cu_q_lens.tolist()}")
    room = spec.table * spec.page_size
    for r, (kv_len, q_len) in enumerate(zip(kv_lens.tolist(), np.diff(cu_q_lens).tolist())):
        if kv_len > room:
            raise _error(f"kv_lens[{r}]={kv_len} is beyond the {room} slots of its page table")
        if kv_len < q_len:
            raise _error(f"kv_lens[{r}]={kv_len} must count the request's {q_len} tokens of this step too")
        used = page_tables[r, : -(-kv_len // spec.page_size)]
        wrong = used[(used < 0) | (used >= spec.pages)]
        if wrong.size:
            raise _error(f"page_tables[{r}] has page {wrong[0]}, but there are {spec.pages}")


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"ragged_paged_attention: {text}")
