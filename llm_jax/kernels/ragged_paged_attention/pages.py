"""Keys and values of many requests in pages of equal size, and how new tokens get into them."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.kernels import debug
from llm_jax.kernels.choice import ArgumentError
from llm_jax.kernels.platform import target_platform

FLOATS = ("float32", "bfloat16", "float16")
CODES = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Packed formats, and the largest number that each one holds."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """P pages of S slots each, a slot for one token's key and value. A pytree; heads lie before slots.

    Latent pages (`v` None) hold one vector a token that is the key, and whose first `value_dim` numbers are the value.
    Slots may be wider than a key or value (`init_pages`), with zeros in the rest.
    """

    k: Float[Array, "P K S H"] | Int[Array, "P K S H"]
    v: Float[Array, "P K S Hv"] | Int[Array, "P K S Hv"] | None
    k_scales: Float[Array, "P K S"] | None = None
    """int8 and float8 pages: key = number in the page · scale, float32, one per slot and head."""
    v_scales: Float[Array, "P K S"] | None = None
    """None for latent pages, whose value goes by the key's scale."""
    value_dim: int | None = field(default=None, metadata={"static": True})
    """Size of a value; None: as wide as its slot."""


def init_pages(
    num_pages: int,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    latent: bool = False,
    dtype: Any = "bfloat16",
    multiple: int | None = None,
) -> Pages:
    """Pages full of zeros.

    Args:
        value_dim: size of a value; default `head_dim`.
        latent: see `Pages`; one head, and `value_dim` says which part of the key is the value.
        multiple: slots are widened to a multiple of so many numbers. Default 128 on TPUs, where XLA lays out narrower
            arrays with the pages last and the kernel would need a copy of all of them at each call; elsewhere 1.

    Raises:
        ArgumentError: an unknown dtype, or sizes that do not fit.
    """
    name = jnp.dtype(dtype).name
    if name not in FLOATS and name not in CODES:
        raise ArgumentError(f"init_pages: dtype={name} is none of {', '.join((*FLOATS, *CODES))}")
    value_dim = head_dim if value_dim is None else value_dim
    if latent and (kv_heads != 1 or not 0 < value_dim <= head_dim):
        raise ArgumentError(f"init_pages: latent pages need one head, not {kv_heads}, and value_dim up to {head_dim}")
    multiple = (128 if target_platform() == "tpu" else 1) if multiple is None else multiple
    slots = (num_pages, kv_heads, page_size)

    def numbers(size: int) -> Array:
        return jnp.zeros((*slots, -(-size // multiple) * multiple), name)

    def scales() -> Array | None:
        return jnp.ones(slots, jnp.float32) if name in CODES else None

    if latent:
        return Pages(numbers(head_dim), None, scales(), None, value_dim)
    return Pages(numbers(head_dim), numbers(value_dim), scales(), scales(), value_dim)


def write_pages(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K Hv"] | None,
    slots: Int[Array, " T"],
) -> Pages:
    """The pages with the keys and values of T tokens in them. Donate `pages`, and they are written in place.

    Each head of a token is one row of what all pages hold, [P · K · S, H]: XLA writes rows in place, where for several
    heads at once, [K, H], a TPU's would turn over all the pages, and back (512 MiB read and written four times to write
    2,048 tokens, by v5e's compiler).

    Packed pages take round(x / scale) with scale max|x| / 127 (int8) or x / scale with max|x| / 448 (float8_e4m3fn).

    Args:
        v: None for latent pages.
        slots: page · S + place in the page. A slot that is not there (negative, or too large) drops its token, so -1
            is for padding; in debug mode only negative ones do. No slot twice.

    Raises:
        ArgumentError: shapes that do not fit; in debug mode, slots past the last page or taken twice.
    """
    count, heads, size, _ = pages.k.shape
    _check_shapes(pages, k, v, slots)
    debug.check_values(lambda slots: _check_slots(slots, count * size), slots)
    inside = ((slots >= 0) & (slots < count * size))[:, None]
    page, place = jnp.clip(slots, 0, count * size - 1) // size, jnp.clip(slots, 0, None) % size
    row = (page[:, None] * heads + jnp.arange(heads)) * size + place[:, None]

    def write(kept: Array | None, new: Array) -> Array | None:
        if kept is None:
            return None
        rows = kept.reshape(count * heads * size, *kept.shape[3:])
        widening = kept.shape[-1] - new.shape[-1] if kept.ndim == 4 else 0
        new = jnp.pad(new, ((0, 0),) * (new.ndim - 1) + ((0, widening),)).astype(kept.dtype)
        if row.size > 1:
            beyond = rows.shape[0] + jnp.arange(row.size).reshape(row.shape)
            rows = rows.at[jnp.where(inside, row, beyond)].set(new, mode="drop", unique_indices=True)
        else:
            # XLA copies a whole buffer for a single update that may be dropped: what is there is written back instead.
            new = jnp.where(inside.reshape(1, 1, *(1,) * (new.ndim - 2)), new, rows[row])
            rows = rows.at[row].set(new, mode="promise_in_bounds")
        return rows.reshape(kept.shape)

    k, k_scales = _packed(pages.k, k)
    new_v = v_scales = None
    if pages.v is not None and v is not None:
        v, v_scales = _packed(pages.v, v)
        new_v = write(pages.v, v)
    new_k = write(pages.k, k)
    assert new_k is not None
    if k_scales is None:
        return Pages(new_k, new_v, value_dim=pages.value_dim)
    v_scales = None if v_scales is None else write(pages.v_scales, v_scales)
    return Pages(new_k, new_v, write(pages.k_scales, k_scales), v_scales, pages.value_dim)


def _packed(kept: Array, x: Float[Array, "T K H"]) -> tuple[Array, Float[Array, "T K"] | None]:
    """The numbers to be kept, and their scales."""
    name = jnp.dtype(kept.dtype).name
    if name not in CODES:
        return x, None
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=-1)
    scales = jnp.where(top > 0, top / CODES[name], 1.0)
    x = x / scales[..., None]
    return (jnp.clip(jnp.round(x), -127, 127) if name == "int8" else x), scales


def _check_shapes(pages: Pages, k: Any, v: Any, slots: Any) -> None:
    if slots.ndim != 1 or not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ArgumentError(f"write_pages: slots must be integers [T]; got {slots.dtype}{list(slots.shape)}")
    if (v is None) != (pages.v is None):
        raise ArgumentError("write_pages: v and the pages' v go together; latent pages have neither")
    for name, new, kept in (("k", k, pages.k), ("v", v, pages.v)):
        if new is None or kept is None:
            continue
        rows, width = (slots.shape[0], kept.shape[1]), kept.shape[3]
        if new.shape[:-1] != rows or new.shape[-1] > width:
            wanted = f"[{rows[0]}, {rows[1]}, at most {width}]"
            raise ArgumentError(f"write_pages: {name} {new.shape} must be {wanted} to go with slots and pages")


def _check_slots(slots: np.ndarray, count: int) -> None:
    taken = slots[slots >= 0]
    if (taken >= count).any():
        raise ArgumentError(f"write_pages: slots has {taken.max()}, but the pages have {count}")
    if np.unique(taken).size != taken.size:
        raise ArgumentError("write_pages: slots has one slot twice")
