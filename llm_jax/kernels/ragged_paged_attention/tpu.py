"""TPU kernel (`tpu_kernel`): what it takes, and what XLA does around it."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels.platform import tpu_refusal
from llm_jax.kernels.ragged_paged_attention.pages import Pages
from llm_jax.kernels.ragged_paged_attention.spec import Batch, Extras, RaggedSpec
from llm_jax.kernels.ragged_paged_attention.work import num_tiles, pack, per_row, tile_tokens, tiles_of, unpack
from llm_jax.kernels.tiles import tiles as tile_sizes

LANES = 128
SCALAR_WORDS = 240 * 1024
"""Page ids and numbers of tiles that the scalar memory, 256 K words, has room for."""
PER_TILE = 5
"""How many of a tile's numbers the kernel keeps there."""
BUFFER_BYTES = 4 * 2**20
"""The most that both buffers of keys and values take."""
ROWS = 2048
"""The most rows (of tokens and heads) of a tile, over all key heads."""


@dataclass(frozen=True)
class Sizes:
    """Rows per key head that a tile has at most (tokens times the heads of a group), and slots per block of keys."""

    rows: int = 256
    block: int = 512


def supports(spec: RaggedSpec, platform: str) -> str | None:
    """bfloat16 and float32 queries, pages of whole tiles of memory, tables that the scalar memory has room for."""
    if reason := tpu_refusal(platform):
        return reason
    if spec.dtype == "float16":
        return "TPUs do not multiply float16"
    if any(width % LANES for width in spec.widths):
        return f"slots {spec.widths} wide are no multiples of {LANES}: XLA would copy all pages at each call"
    rows = 32 // jnp.dtype(spec.page_dtype).itemsize
    if spec.page_size % rows:
        return f"page size {spec.page_size} is no multiple of {rows}, a tile of {spec.page_dtype} in memory"
    tiles = num_tiles(spec, _tile_tokens(spec, _sizes(spec)))
    if spec.requests * spec.table + PER_TILE * tiles > SCALAR_WORDS:
        numbers = f"{spec.requests} x {spec.table} page ids and {PER_TILE} numbers of {tiles} tiles"
        return f"{numbers} are more than the {SCALAR_WORDS} that scalar memory holds"
    if _bytes(spec, spec.page_size) > 2 * BUFFER_BYTES:
        return f"two pages of {spec.page_size} slots and {spec.kv_heads} heads take more than {2 * BUFFER_BYTES} bytes"
    return None


def attention(
    spec: RaggedSpec, q: Float[Array, "T N H"], pages: Pages, batch: Batch, extras: Extras
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """Output in q's dtype and float32 log-sum-exp (-inf where the call does not ask for it)."""
    from llm_jax.kernels.ragged_paged_attention import tpu_kernel

    sizes = _sizes(spec)
    size = _tile_tokens(spec, sizes)
    block = block_slots(spec, sizes.block)
    work = tiles_of(spec, batch, size)
    scales = [None if x is None else _by_request(x[batch.page_tables], block) for x in (pages.k_scales, pages.v_scales)]
    slopes, sinks = (per_row(spec, x, size) for x in extras)
    # Keys have zeros where queries are widened, or nothing that is seen.
    queries = jnp.pad(pack(spec, work, q, size), ((0, 0),) * 3 + ((0, spec.widths[0] - spec.head_dim),))
    out, lse = tpu_kernel.attention(spec, block, work, batch.page_tables, queries, pages, scales, slopes, sinks)
    if lse is None:
        none = jnp.full((spec.tokens, spec.heads), -jnp.inf)
    else:
        none = unpack(spec, batch, lse, size, empty=-jnp.inf)
    return unpack(spec, batch, out, size), none


def _sizes(spec: RaggedSpec) -> Sizes:
    shape = f"hd{spec.head_dim} group{spec.group} page{spec.page_size}"
    return tile_sizes("ragged_paged_attention", "tpu", dtype=spec.page_dtype, shape=shape, default=Sizes())


def _tile_tokens(spec: RaggedSpec, sizes: Sizes) -> int:
    return tile_tokens(spec, max(1, min(sizes.rows, ROWS // spec.kv_heads) // spec.group))


def block_slots(spec: RaggedSpec, most: int) -> int:
    """Slots per block of keys: whole pages, and no more than the table or the buffers hold."""
    pages = max(1, min(most, spec.table * spec.page_size) // spec.page_size)
    while pages > 1 and _bytes(spec, pages * spec.page_size) > BUFFER_BYTES:
        pages //= 2
    return pages * spec.page_size


def _bytes(spec: RaggedSpec, slots: int) -> int:
    numbers = sum(spec.widths[:1] if spec.latent else spec.widths)
    return 2 * slots * spec.kv_heads * numbers * jnp.dtype(spec.page_dtype).itemsize


def _by_request(scales: Float[Array, "R M K S"], block: int) -> Float[Array, "R J K s"]:
    """Scales in the order of a request's slots, in blocks. They are small beside the numbers: 1/32 at head size 128."""
    R, M, K, S = scales.shape
    scales = jnp.moveaxis(scales, 2, 1).reshape(R, K, M * S)
    scales = jnp.pad(scales, ((0, 0), (0, 0), (0, -(M * S) % block)))
    return jnp.moveaxis(scales.reshape(R, K, -1, block), 2, 1)
