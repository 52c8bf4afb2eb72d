"""Decoding from pages and from a contiguous cache on this machine's CPU: the attention of one step, float32.

    python experiments/benchmarks/paged_cpu.py [--repeats 101]

`ragged_paged_attention` over shuffled pages against `decode_attention` over the same keys and values in one array: four
layers one after the other in one program, as in a model. The first shape is that of the decoding benchmark's model (8
heads of 32, 6.8M parameters). "full" rows have all caches full, the worst case for pages; "mixed" rows have lengths as
requests have them (log-normal, the longest fills the cache), and pages for no more than that, where a contiguous cache
is read to the end. Calls alternate, so that a busy machine disturbs both alike. Prints a Markdown table of medians (and
least), in milliseconds of wall time; the last column is the contiguous cache's time over that of pages, by both.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llm_jax.kernels import Pages, decode_attention, ragged_paged_attention

LAYERS = 4
SHAPES = ((256, 8, 8, 32), (1024, 32, 8, 64))
"""Slots of the cache, heads, key heads, head size."""
BATCHES = (1, 16)
PAGES = (16, 64)


def lengths(batch: int, slots: int, mixed: bool) -> np.ndarray:
    if not mixed:
        return np.full(batch, slots, np.int32)
    drawn = np.random.default_rng(1).lognormal(0.0, 1.0, batch)
    return np.maximum(1, slots * drawn / drawn.max()).astype(np.int32)


def calls(batch: int, slots: int, heads: int, kv_heads: int, size: int, mixed: bool) -> dict[str, Callable[[], None]]:
    """One step by each of the ways. All give the same result."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(batch, heads, size)), jnp.float32)
    shape = (2 * LAYERS, batch, kv_heads, slots, size)
    caches = list(rng.normal(size=shape).astype(np.float32))
    filled = lengths(batch, slots, mixed)

    @jax.jit
    def contiguous(q: Array, caches: list[Array], lengths: Array) -> Array:
        for k, v in zip(caches[::2], caches[1::2]):
            q = decode_attention(q, k, v, lengths)
        return q

    @jax.jit
    def paged(q: Array, layers: list[Pages], lengths: Array, tables: Array) -> Array:
        for pages in layers:
            q = ragged_paged_attention(q, pages, lengths, tables, jnp.arange(batch + 1))
        return q

    def ready(call: Callable, *arrays: object) -> Callable[[], None]:
        return lambda: jax.block_until_ready(call(*arrays))

    kept = (q, [jnp.asarray(x) for x in caches], jnp.asarray(filled))
    want = contiguous(*kept)
    found = {"contiguous": ready(contiguous, *kept)}
    for page in PAGES:
        counts = -(-filled // page)
        real = np.arange(slots // page) < counts[:, None]
        tables = np.zeros(real.shape, np.int32)
        tables[real] = rng.permutation(counts.sum())

        def in_pages(x: np.ndarray, page: int = page, real: np.ndarray = real, tables: np.ndarray = tables) -> Array:
            cut = x.reshape(batch, kv_heads, -1, page, size).swapaxes(1, 2)[real]
            return jnp.asarray(cut[np.argsort(tables[real])])

        layers = [Pages(in_pages(k), in_pages(v)) for k, v in zip(caches[::2], caches[1::2])]
        arrays = (q, layers, jnp.asarray(filled), jnp.asarray(tables))
        np.testing.assert_allclose(paged(*arrays), want, atol=1e-5)
        found[f"pages of {page}"] = ready(paged, *arrays)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=101)
    options = parser.parse_args()
    print("| slots, heads, key heads, size | batch | lengths | cache | median (least) ms | contiguous / pages |")
    print("|---|---|---|---|---|---|", flush=True)
    for shape in SHAPES:
        for batch in BATCHES:
            for mixed in (False, True) if batch > 1 else (False,):
                ways = calls(batch, *shape, mixed)
                times: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(options.repeats):
                    for name, call in ways.items():
                        begin = time.perf_counter()
                        call()
                        times[name].append(1e3 * (time.perf_counter() - begin))
                for name, each in times.items():
                    base, median = np.median(times["contiguous"]), np.median(each)
                    ratio = f"{base / median:.2f} ({min(times['contiguous']) / min(each):.2f})"
                    case = f"{', '.join(map(str, shape))} | {batch} | {'mixed' if mixed else 'full'}"
                    print(f"| {case} | {name} | {median:.3f} ({min(each):.3f}) | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
