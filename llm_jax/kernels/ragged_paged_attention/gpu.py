"""Hopper kernel (`gpu_kernel`): what it takes, when keys are split among blocks of threads, and the combining."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels.platform import hopper_refusal
from llm_jax.kernels.ragged_paged_attention.pages import Pages
from llm_jax.kernels.ragged_paged_attention.spec import Batch, Extras, RaggedSpec
from llm_jax.kernels.ragged_paged_attention.work import num_tiles, pack, per_row, tile_tokens, tiles_of, unpack
from llm_jax.kernels.tiles import tiles as tile_sizes

PROCESSORS = 132
"""Of an H100 or H200."""
TABLE = 8192
"""Page ids per request that shared memory has room for."""
MOST_SPLITS = 32
WARPGROUP_ROWS = 64
SHARED, RESERVED = 232448, 1024
"""Bytes of shared memory that a block of threads can have, and that it takes besides."""


@dataclass(frozen=True)
class Sizes:
    """Rows of a tile (tokens times the heads of a group) at most, slots per block of keys, blocks in flight."""

    rows: int = 128
    block: int = 64
    stages: int = 3


def supports(spec: RaggedSpec, platform: str) -> str | None:
    """bfloat16 and float16 queries on Hopper, head sizes that are multiples of 64, what fits into shared memory."""
    if reason := hopper_refusal(platform):
        return reason
    if spec.dtype == "float32":
        return "tensor cores take bfloat16 and float16, not float32"
    if (spec.head_dim, spec.value_dim) != spec.widths and not spec.latent or spec.head_dim != spec.widths[0]:
        return f"slots {spec.widths} are wider than a key and value, {(spec.head_dim, spec.value_dim)}"
    if spec.head_dim % 64 or spec.value_dim % (128 if spec.latent else 64):
        return f"sizes {(spec.head_dim, spec.value_dim)} must be multiples of 64, latent values of 128"
    if spec.value_dim > (512 if spec.latent else 256):
        return f"values of {spec.value_dim} numbers do not fit into registers"
    if spec.latent and spec.packed and spec.value_dim > 256:
        return f"{spec.page_dtype} latent values of {spec.value_dim} numbers do not fit into registers"
    if spec.packed and max(spec.widths) > 256:
        return f"a copy brings 256 numbers of a {spec.page_dtype} key, not {max(spec.widths)}"
    if spec.page_size not in (16, 32) and spec.page_size % 64:
        return f"page size {spec.page_size} must be 16, 32 or a multiple of 64"
    if spec.table > TABLE:
        return f"tables of {spec.table} pages are more than the {TABLE} that shared memory holds"
    if _shared_bytes(spec, 2, Sizes().block, 2) > SHARED:
        return f"head sizes {(spec.head_dim, spec.value_dim)} with {spec.table} page ids do not fit into shared memory"
    return None


def attention(
    spec: RaggedSpec, q: Float[Array, "T N H"], pages: Pages, batch: Batch, extras: Extras
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """Output in q's dtype and float32 log-sum-exp."""
    from llm_jax.kernels.ragged_paged_attention import gpu_kernel

    size = tile_tokens(spec, max(1, Sizes().rows // spec.group))
    default = Sizes(stages=stages_that_fit(spec, num_warpgroups(spec, size * spec.group)))
    kind = "decode" if size == 1 else "mixed"
    shape = f"hd{spec.head_dim} group{spec.group} page{spec.page_size} {spec.page_dtype} {kind}"
    sizes = tile_sizes("ragged_paged_attention", "gpu", dtype=spec.dtype, shape=shape, default=default)
    size = tile_tokens(spec, max(1, sizes.rows // spec.group))
    blocks = -(-spec.table * spec.page_size // sizes.block)
    splits = num_splits(num_tiles(spec, size) * spec.kv_heads, blocks)
    work = tiles_of(spec, batch, size)
    slopes, sinks = (per_row(spec, x, size) for x in extras)
    out, lse = gpu_kernel.attention(
        spec, sizes, splits, work, batch.page_tables, pack(spec, work, q, size), pages, slopes, sinks
    )
    if splits > 1:
        out, lse = combined(out, lse)
    out, lse = out.reshape(-1, *out.shape[2:]), lse.reshape(-1, *lse.shape[2:])
    return unpack(spec, batch, out.astype(q.dtype), size), unpack(spec, batch, lse, size, empty=-jnp.inf)


def num_warpgroups(spec: RaggedSpec, rows: int) -> int:
    """Of a block of threads: one for 64 rows; latent pages take two for these."""
    return 2 if spec.latent or rows > WARPGROUP_ROWS else 1


def stages_that_fit(spec: RaggedSpec, warpgroups: int) -> int:
    """Blocks in flight, 2 to 4, so that a processor has two blocks of threads of one warpgroup, or one of two."""
    room = SHARED if warpgroups == 2 else (SHARED - RESERVED) // 2
    return next((n for n in (4, 3) if _shared_bytes(spec, warpgroups, Sizes().block, n) <= room), 2)


def _shared_bytes(spec: RaggedSpec, warpgroups: int, block: int, stages: int) -> int:
    numbers = spec.widths[0] if spec.latent else sum(spec.widths)
    row_groups = 1 if spec.latent else warpgroups
    kept = block * stages * (numbers * jnp.dtype(spec.page_dtype).itemsize + 8 * spec.packed)
    unpacked = 2 * block * numbers * spec.packed
    return kept + unpacked + 2 * row_groups * WARPGROUP_ROWS * spec.head_dim + 4 * spec.table + 4096


def num_splits(tiles: int, blocks: int, processors: int = PROCESSORS) -> int:
    """Parts that each tile's keys are cut into, so that few tiles occupy all processors.

    FlashAttention-3's rule (https://arxiv.org/abs/2407.08608, its decoding kernel): none where the tiles take 0.8 of
    the processors or keys are few; else the fewest parts whose last wave is full to 85% of the best choice.
    """
    if tiles >= 0.8 * processors or blocks <= 4:
        return 1
    choices = range(1, min(MOST_SPLITS, processors, blocks) + 1)
    waves = {n: tiles * n / processors for n in choices}
    efficiency = {n: wave / -(-tiles * n // processors) for n, wave in waves.items()}
    best = max(efficiency.values())
    return next(n for n in choices if efficiency[n] >= 0.85 * best)


def combined(out: Float[Array, "P *rows Hv"], lse: Float[Array, "P *rows"]) -> tuple[Array, Array]:
    """Parts of the same rows over different keys put together by their log-sum-exps; keeps an axis of one part."""
    top = jnp.max(lse, axis=0, keepdims=True)
    weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=0, keepdims=True)
    share = weights * jnp.where(total > 0, 1.0 / total, 0.0)
    return jnp.sum(out * share[..., None], axis=0, keepdims=True), top + jnp.log(total)
