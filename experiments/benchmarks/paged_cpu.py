"""Decoding from pages and from a contiguous cache on this machine's CPU: one step of attention, float32.

    python experiments/benchmarks/paged_cpu.py [--repeats 101]

`ragged_paged_attention` over shuffled pages against `decode_attention` over the same keys and values in one array, each
compiled once; the first shape is that of the decoding benchmark's model (8 heads of 32, 6.8M parameters). "full" rows
have all caches full, the worst case for pages; "mixed" rows have lengths as requests have them (log-normal, the longest
fills the cache), where a loop over blocks of keys ends with each request and a contiguous cache is read to the end.
Calls alternate, so that a busy machine disturbs both alike. Prints a Markdown table of medians (and least), in
milliseconds of wall time; the last column is the contiguous cache's median over that of pages.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import Pages, decode_attention, ragged_paged_attention

SHAPES = ((256, 8, 8, 32), (1024, 8, 8, 64), (1024, 32, 8, 64))
"""Slots of the cache, heads, key heads, head size."""
BATCHES = (1, 16)
PAGES = (16, 64, 128)


def lengths(batch: int, slots: int, mixed: bool) -> np.ndarray:
    if not mixed:
        return np.full(batch, slots, np.int32)
    drawn = np.random.default_rng(1).lognormal(0.0, 1.0, batch)
    return np.maximum(1, slots * drawn / drawn.max()).astype(np.int32)


def calls(batch: int, slots: int, heads: int, kv_heads: int, size: int, mixed: bool) -> dict[str, Callable[[], None]]:
    """One step by each of the ways. All give the same result."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(batch, heads, size)), jnp.float32)
    k, v = (rng.normal(size=(batch, kv_heads, slots, size)).astype(np.float32) for _ in range(2))
    filled = jnp.asarray(lengths(batch, slots, mixed))
    contiguous = jax.jit(decode_attention)
    # On the device before the clock starts.
    kept = jax.block_until_ready((q, jnp.asarray(k), jnp.asarray(v), filled))
    want = contiguous(*kept)
    found: dict[str, Callable[[], None]] = {"contiguous": lambda: jax.block_until_ready(contiguous(*kept))}
    for page in PAGES:
        tables = rng.permutation(batch * slots // page).reshape(batch, -1)

        def in_pages(x: np.ndarray, page: int = page, tables: np.ndarray = tables) -> jax.Array:
            cut = x.reshape(batch, kv_heads, -1, page, size).swapaxes(1, 2)
            return jnp.asarray(cut.reshape(-1, kv_heads, page, size)[np.argsort(tables.ravel())])

        paged = jax.jit(ragged_paged_attention)
        arrays = (q, Pages(in_pages(k), in_pages(v)), filled, jnp.asarray(tables, jnp.int32), jnp.arange(batch + 1))
        np.testing.assert_allclose(paged(*arrays), want, atol=1e-5)
        found[f"pages of {page}"] = lambda arrays=arrays, paged=paged: jax.block_until_ready(paged(*arrays))
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
                    median, base = float(np.median(each)), float(np.median(times["contiguous"]))
                    ratio = "" if name == "contiguous" else f"{base / median:.2f}"
                    case = f"{', '.join(map(str, shape))} | {batch} | {'mixed' if mixed else 'full'}"
                    print(f"| {case} | {name} | {median:.3f} ({min(each):.3f}) | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
