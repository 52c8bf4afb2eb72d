"""`ssd` and `selective_scan` on this machine's CPU: chunks (xla) beside the token-by-token scan (reference), float32.

    python experiments/benchmarks/scans_cpu.py [--repeats 9]

Prints a Markdown table of medians (and least) in milliseconds of wall time for the forward pass with all gradients,
and the peak memory that the compiler plans (arguments, results and temporaries). Calls of the two alternate, so that a
busy machine disturbs both alike. "packed" rows hold documents of 100 tokens. The lines to hold: `ssd` at least 5 times
as fast as the token-by-token scan; `selective_scan` no slower than it, at no more than a quarter of its memory. The
status is 1 if one does not hold.
"""

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import kernels

SHAPES = {
    "ssd": ((2, 1024, 8, 64, 1, 128), (1, 2048, 24, 64, 1, 128)),
    "selective_scan": ((2, 1024, 512, 16), (1, 2048, 1536, 16)),
}
"""B, T, heads, head size, groups, states; the second is a layer of Mamba-2-130M. B, T, channels, states; Mamba-130M."""
DOCUMENT = 100
SIDES = ("xla", "reference")
FASTER = {"ssd": 5.0, "selective_scan": 1.0}
MEMORY = {"ssd": 1.0, "selective_scan": 0.25}


def arguments(op: str, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """x, dt, A, B, C, skip with steps and rates as in trained models: dt about 0.05, A from -1 to -16."""
    B, T, *inner = shape
    keys = jax.random.split(jax.random.key(0), 5)
    if op == "ssd":
        H, P, G, N = inner
        x, per_step, selected, rates = (B, T, H, P), (B, T, H), (B, T, G, N), jnp.linspace(1.0, 16.0, H)
    else:
        D, N = inner
        x, per_step, selected = (B, T, D), (B, T, D), (B, T, N)
        rates = jnp.broadcast_to(jnp.arange(1.0, N + 1), (D, N))
    return (
        jax.random.normal(keys[0], x),
        jax.nn.softplus(jax.random.normal(keys[1], per_step) - 3),
        -rates,
        jax.random.normal(keys[2], selected),
        jax.random.normal(keys[3], selected),
        jax.random.normal(keys[4], per_step[2:]),
    )


def program(op: str, shape: tuple[int, ...], packed: bool, side: str) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward pass, compiled, and its arguments."""
    arrays = arguments(op, shape)
    B, T = shape[:2]
    segments = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // DOCUMENT + 1, (B, T)) if packed else None
    cotangent = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def both(cotangent: jax.Array, segments: Any, *arrays: jax.Array) -> Any:
        run = lambda *arrays: getattr(kernels, op)(*arrays, segment_ids=segments, implementation=side)  # noqa: E731
        y, pull = jax.vjp(run, *arrays)
        return y, pull(cotangent)

    inputs = cotangent, segments, *arrays
    return jax.jit(both).lower(*inputs).compile(), inputs


def mib(compiled: Any) -> float:
    """Most that is alive at a time, as planned."""
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (total - memory.alias_size_in_bytes) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print("| op | shape | | chunks ms | token by token ms | times as fast | MiB | MiB | share | lines |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    all_hold = True
    for op, shape, packed in [
        (op, shape, packed) for op, shapes in SHAPES.items() for shape in shapes for packed in (False, True)
    ]:
        sides = {side: program(op, shape, packed, side) for side in SIDES}
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for i in range(repeats + 1):
            for side, (compiled, inputs) in sides.items():
                start = time.perf_counter()
                jax.block_until_ready(compiled(*inputs))
                if i:  # the first turn warms
                    times[side].append(1e3 * (time.perf_counter() - start))
        median = {side: sorted(t)[len(t) // 2] for side, t in times.items()}
        peak = {side: mib(compiled) for side, (compiled, _) in sides.items()}
        faster, share = median["reference"] / median["xla"], peak["xla"] / peak["reference"]
        holds = faster >= FASTER[op] and share <= MEMORY[op]
        all_hold &= holds
        cells = [f"{median[side]:.0f} ({min(times[side]):.0f})" for side in SIDES]
        cells += [f"{faster:.2f}", *(f"{peak[side]:.0f}" for side in SIDES), f"{share:.2f}"]
        row = [op, " ".join(map(str, shape)), "packed" if packed else "one document", *cells]
        print(f"| {' | '.join(row)} | {'hold' if holds else 'DO NOT HOLD'} |", flush=True)
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
