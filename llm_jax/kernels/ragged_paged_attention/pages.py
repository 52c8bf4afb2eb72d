"""Keys and values of many requests in pages of equal size, and how new tokens get into them."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.kernels import debug
from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")
CODES = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Packed formats, and the largest number that each one holds."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """P pages of S slots each, a slot for one token's key and value. A pytree; heads lie before slots.

    Latent pages (`v` None) hold one vector a token that is the key, and whose first `latent` numbers are the value.
    """

    k: Float[Array, "P K S H"] | Int[Array, "P K S H"]
    v: Float[Array, "P K S Hv"] | Int[Array, "P K S Hv"] | None
    k_scales: Float[Array, "P K S"] | None = None
    """int8 and float8 pages: key = number in the page · scale, float32, one per slot and head."""
    v_scales: Float[Array, "P K S"] | None = None
    """None for latent pages, whose value goes by the key's scale."""
    latent: int | None = field(default=None, metadata={"static": True})


def init_pages(
    num_pages: int,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    latent: int | None = None,
    dtype: Any = "bfloat16",
) -> Pages:
    """Pages full of zeros. `value_dim`: size of a value where it is not `head_dim`; `latent`: see `Pages`.

    Raises:
        ArgumentError: an unknown dtype, or sizes that do not fit.
    """
    name = jnp.dtype(dtype).name
    if name not in FLOATS and name not in CODES:
        raise ArgumentError(f"init_pages: dtype={name} is none of {', '.join((*FLOATS, *CODES))}")
    if latent is not None and (kv_heads != 1 or value_dim is not None or not 0 < latent <= head_dim):
        raise ArgumentError(f"init_pages: latent={latent} needs one head of at least that size, and no value_dim")
    slots = (num_pages, kv_heads, page_size)
    values = latent is None

    def scales() -> Array | None:
        return jnp.ones(slots, jnp.float32) if name in CODES else None

    return Pages(
        jnp.zeros((*slots, head_dim), name),
        jnp.zeros((*slots, value_dim or head_dim), name) if values else None,
        scales(),
        scales() if values else None,
        latent,
    )


def write_pages(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K Hv"] | None,
    slots: Int[Array, " T"],
) -> Pages:
    """The pages with the keys and values of T tokens in them. Donate `pages`, and they are written in place.

    Packed pages take round(x / scale) with scale max|x| / 127 (int8) or x / scale with max|x| / 448 (float8_e4m3fn).

    Args:
        v: None for latent pages.
        slots: page · S + place in the page. A slot that is not there (negative, or too large) drops its token, so -1
            is for padding; in debug mode only negative ones do. No slot twice.

    Raises:
        ArgumentError: shapes that do not fit; in debug mode, slots past the last page or taken twice.
    """
    count, _, size, _ = pages.k.shape
    _check_shapes(pages, k, v, slots)
    debug.check_values(lambda slots: _check_slots(slots, count * size), slots)

    def write(kept: Array | None, new: Array) -> Array | None:
        if kept is None:
            return None
        inside = (slots >= 0) & (slots < count * size)
        page, place = jnp.clip(slots, 0, count * size - 1) // size, jnp.clip(slots, 0, None) % size
        new = new.astype(kept.dtype)
        if slots.shape[0] > 1:
            return kept.at[jnp.where(inside, page, count), :, place].set(new, mode="drop")
        # XLA copies a whole buffer for a single update that may be dropped: what is there is written back instead.
        new = jnp.where(inside.reshape(-1, *(1,) * (new.ndim - 1)), new, kept[page, :, place])
        return kept.at[page, :, place].set(new, mode="promise_in_bounds")

    k, k_scales = _packed(pages.k, k)
    new_v = v_scales = None
    if pages.v is not None and v is not None:
        v, v_scales = _packed(pages.v, v)
        new_v = write(pages.v, v)
    new_k = write(pages.k, k)
    assert new_k is not None
    if k_scales is None:
        return Pages(new_k, new_v, latent=pages.latent)
    v_scales = None if v_scales is None else write(pages.v_scales, v_scales)
    return Pages(new_k, new_v, write(pages.k_scales, k_scales), v_scales, pages.latent)


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
        wanted = None if kept is None else (slots.shape[0], kept.shape[1], kept.shape[3])
        if new is not None and new.shape != wanted:
            raise ArgumentError(f"write_pages: {name} {new.shape} must be {wanted} to go with slots and pages")


def _check_slots(slots: np.ndarray, count: int) -> None:
    taken = slots[slots >= 0]
    if (taken >= count).any():
        raise ArgumentError(f"write_pages: slots has {taken.max()}, but the pages have {count}")
    if np.unique(taken).size != taken.size:
        raise ArgumentError("write_pages: slots has one slot twice")
