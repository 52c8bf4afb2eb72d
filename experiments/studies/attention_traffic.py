"""Bytes that attention moves to and from HBM, by length: "O(N) instead of O(N^2)", tested.

    python experiments/studies/attention_traffic.py [--longest 16384] [--svg FILE] [--topology v5e:2x2]

Flash attention is often said to move O(N) bytes where standard attention moves O(N^2). Dao et al. 2022 (theorem 2) say
something else: Theta(N^2 d^2 / M) with M the fast memory and d the head size (d <= M <= N d), against
Theta(N d + N^2); what is linear in N is the memory that is kept. All three are counted here, per head, in bfloat16:

- standard attention: bytes of the unfused passes (scores and probabilities written and read), and what XLA's compiler
  counts for the plain form ("bytes accessed" of the optimized program; of a TPU with --topology, in an environment
  that has libtpu; else of a CPU, float32 scores);
- flash attention: from the schedule of its blocks, the one that the kernels skip by: a block of queries and its result
  once, and each visible block of keys and values once for each block of queries;
- the same schedule with a cache between: blocks of queries run together as an H200 runs them (132 at a time), and keys
  come from HBM only where the 60 MB of L2, least recently used out first, have lost them; and with 2 MB and 4 at a
  time, where these lengths pass the point at which the keys of a head no longer fit;
- memory: temporaries of the compiled programs.

Prints Markdown tables and the exponents of power laws through the two longest lengths; the plot has bytes by length.
"""

import argparse
import math
import os
from collections import OrderedDict
from pathlib import Path

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from common import table
from plot import lines

from llm_jax.kernels import flash_attention
from llm_jax.kernels.flash_attention.bounds import Tiling, block_bounds
from llm_jax.kernels.flash_attention.spec import AttentionSpec, MaskArrays, attention_spec
from llm_jax.sharding.described import compile_for

SHORTEST, HEAD_DIM, BLOCK = 512, 128, 128
ITEM = 2
"""Bytes of a number; the log-sum-exp has 4."""
L2, AT_ONCE = 60 * 10**6, 132
"""Of an H200."""
HEADS = 32
"""Of a row, each with keys and values of its own."""


def call(T: int, head_dim: int, causal: bool) -> AttentionSpec:
    x = jax.ShapeDtypeStruct((1, T, 1, head_dim), jnp.bfloat16)
    return attention_spec(x, x, x, causal=causal)


def visited(spec: AttentionSpec, q_block: int, kv_block: int) -> list[tuple[int, int]]:
    """For each block of queries, its first block of keys and one past its last."""
    tiles = Tiling(1, 1, math.ceil(spec.q_len / q_block), q_block, math.ceil(spec.kv_len / kv_block), kv_block)
    low, high = (np.asarray(x)[0] for x in block_bounds(spec, tiles, MaskArrays()))
    return [(int(a), int(b)) for a, b in zip(low, high)]


def flash_bytes(spec: AttentionSpec, q_block: int = BLOCK, kv_block: int = BLOCK) -> int:
    """Of a forward pass from the schedule, nothing cached between blocks of queries."""
    blocks = sum(high - low for low, high in visited(spec, q_block, kv_block))
    own = spec.q_len * (2 * ITEM * spec.head_dim + 4)
    return own + blocks * kv_block * 2 * ITEM * spec.head_dim


def backward_bytes(spec: AttentionSpec, block: int = BLOCK) -> int:
    """Of the two kernels without atomics: queries' gradients over keys, then keys' gradients over queries."""
    blocks = sum(high - low for low, high in visited(spec, block, block))
    moved = ITEM * spec.head_dim
    rows = 8  # log-sum-exp and delta
    queries = spec.q_len * (3 * moved + rows) + blocks * block * 2 * moved
    return queries + spec.kv_len * 4 * moved + blocks * block * (2 * moved + rows)


def cached_bytes(spec: AttentionSpec, cache: int = L2, at_once: int = AT_ONCE, heads: int = HEADS) -> float:
    """Per head, with a cache between: `at_once` blocks of queries walk over their keys in step."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    size, missed = BLOCK * 2 * ITEM * spec.head_dim, 0
    work = [(head, *bounds) for head in range(heads) for bounds in visited(spec, BLOCK, BLOCK)]
    for start in range(0, len(work), at_once):
        together = work[start : start + at_once]
        for step in range(max(high - low for _, low, high in together)):
            for key in dict.fromkeys((head, low + step) for head, low, high in together if low + step < high):
                missed += key not in held
                held[key] = None
                held.move_to_end(key)
                while len(held) * size > cache:
                    held.popitem(last=False)
    return spec.q_len * (2 * ITEM * spec.head_dim + 4) + missed * size / heads


def standard_bytes(T: int, head_dim: int) -> int:
    """Scores and probabilities written and read once each, whatever the mask: a mask is added to whole scores."""
    return ITEM * (4 * T * head_dim + 4 * T * T)


def compiled(topology: str, T: int, head_dim: int, implementation: str) -> tuple[float, int]:
    """What the compiler counts as bytes accessed by the plain form, and bytes of temporaries."""
    x = jax.ShapeDtypeStruct((1, T, 1, head_dim), jnp.bfloat16)

    def attend(q, k, v):
        return flash_attention(q, k, v, causal=False, implementation=implementation)

    program = compile_for(topology, attend, x, x, x) if topology else jax.jit(attend).lower(x, x, x).compile()
    costs, memory = program.cost_analysis() or {}, program.memory_analysis()
    return costs.get("bytes accessed", math.nan), 0 if memory is None else memory.temp_size_in_bytes


def exponent(values: dict[int, float]) -> float:
    """Of the power law through the last two points."""
    (x1, y1), (x2, y2) = sorted(values.items())[-2:]
    return math.log(y2 / y1) / math.log(x2 / x1)


def by_length(lengths: list[int], topology: str) -> dict[str, dict[int, float]]:
    full = {T: call(T, HEAD_DIM, causal=False) for T in lengths}
    causal = {T: call(T, HEAD_DIM, causal=True) for T in lengths}
    plain = {T: compiled(topology, T, HEAD_DIM, "reference") for T in lengths}
    tiled = {T: compiled(topology, T, HEAD_DIM, "xla") for T in lengths}
    return {
        "standard, by its passes": {T: standard_bytes(T, HEAD_DIM) for T in lengths},
        "standard, by the compiler": {T: plain[T][0] for T in lengths},
        "flash, full": {T: flash_bytes(spec) for T, spec in full.items()},
        "flash, causal": {T: flash_bytes(spec) for T, spec in causal.items()},
        "flash, full, behind L2": {T: cached_bytes(spec) for T, spec in full.items()},
        "flash, full, behind 2 MB": {T: cached_bytes(spec, 2 * 10**6, 4, 4) for T, spec in full.items()},
        "flash, forward and backward": {T: flash_bytes(spec) + backward_bytes(spec) for T, spec in full.items()},
        "each array once": {T: T * (4 * ITEM * HEAD_DIM + 4) for T in lengths},
        "temporaries, standard": {T: plain[T][1] for T in lengths},
        "temporaries, tiled": {T: tiled[T][1] for T in lengths},
    }


def laws(T: int) -> list[list[object]]:
    """How the schedule's bytes go with each of N, d and M, the other two fixed. M holds four blocks: q, k, v, out."""

    def moved(T: int, head_dim: int, fast: int) -> int:
        block = fast // (4 * ITEM * head_dim)
        return flash_bytes(call(T, head_dim, causal=False), block, block)

    fast = 256 * 1024
    found = {
        "N": (2.0, {n: float(moved(n, 64, fast)) for n in (4 * T, 8 * T)}),
        "d": (2.0, {d: float(moved(8 * T, d, fast)) for d in (64, 128)}),
        "M": (-1.0, {m: float(moved(8 * T, 64, m)) for m in (fast // 4, fast // 2)}),
    }
    return [[name, f"{law:.0f}", f"{exponent(values):.2f}"] for name, (law, values) in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--topology", default="", help="a TPU to compile the plain form for")
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    lengths = [SHORTEST << i for i in range(int(math.log2(options.longest / SHORTEST)) + 1)]
    found = by_length(lengths, options.topology)
    rows = [
        [
            name,
            *(f"{values[T] / 2**20:.2f}" for T in lengths),
            f"{exponent(values):.2f}" if all(values.values()) else "",
        ]
        for name, values in found.items()
    ]
    print(f"MiB per head, head size {HEAD_DIM}, blocks of {BLOCK}\n")
    print(table(["", *map(str, lengths), "exponent"], rows))
    print("\nExponents of the schedule's bytes, Theta(N^2 d^2 / M)\n")
    print(table(["of", "theorem", "counted"], laws(lengths[-1])))
    if options.svg:
        shown = {name: found[name] for name in list(found)[:6] + ["each array once"]}
        curves = {name: [(float(T), values[T] / 2**20) for T in lengths] for name, values in shown.items()}
        caption = f"length; MiB to and from HBM per head, head size {HEAD_DIM}, both axes logarithmic"
        options.svg.write_text(lines(curves, caption, log_x=True, log_y=True))


if __name__ == "__main__":
    main()
