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


@dataclass(frozen=True)
class Sizes:
    """Rows of a tile (tokens times the heads of a group) at most, slots per block of keys, blocks in flight."""

    rows: int = 128
    block: int = 64
    stages: int = 3


def supports(spec: RaggedSpec, platform: str) -> str | None:
    """bfloat16 and float16 pages on Hopper, head sizes that are multiples of 64 up to 256."""
    if reason := hopper_refusal(platform):
        return reason
    if spec.dtype == "float32":
        return "tensor cores take bfloat16 and float16, not float32"
    if spec.packed:
        return f"no {spec.page_dtype} pages"
    if spec.latent:
        return "no latent pages"
    if (spec.head_dim, spec.value_dim) != spec.widths:
        return f"slots {spec.widths} are wider than a key and value, {(spec.head_dim, spec.value_dim)}"
    if any(size % 64 or size > 256 for size in spec.widths):
        return f"head sizes {spec.widths} must be multiples of 64 up to 256"
    if spec.page_size not in (16, 32) and spec.page_size % 64:
        return f"page size {spec.page_size} must be 16, 32 or a multiple of 64"
    if spec.table > TABLE:
        return f"tables of {spec.table} pages are more than the {TABLE} that shared memory holds"
    return None


def attention(
    spec: RaggedSpec, q: Float[Array, "T N H"], pages: Pages, batch: Batch, extras: Extras
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """Output in q's dtype and float32 log-sum-exp."""
    from llm_jax.kernels.ragged_paged_attention import gpu_kernel

    shape = f"hd{spec.head_dim} group{spec.group} page{spec.page_size}"
    default = Sizes(stages=3 if sum(spec.widths) <= 256 else 2)
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
