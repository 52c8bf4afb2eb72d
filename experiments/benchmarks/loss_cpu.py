"""linear_cross_entropy on this machine's CPU beside the plain form, which holds the logits: float32, a 128k vocabulary.

    JAX_PLATFORMS=cpu python experiments/benchmarks/loss_cpu.py [--tokens 1024] [--width 256] [--repeats 5]

Prints a Markdown table: medians (and least) in milliseconds of wall time and of CPU time, the calls of both forms in
turn, so that a busy machine disturbs both alike; and the memory that XLA plans beside arguments and results, for
MEMORY_TOKENS tokens, as a share of their float32 logits.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels import linear_cross_entropy

VOCAB = 128256
MEMORY_TOKENS = 8192


def plain(hidden: Any, head: Any, targets: Any) -> Any:
    """Log-probabilities from the logits of all tokens."""
    logits = jnp.matmul(hidden, head, precision="highest")
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]


def ours(hidden: Any, head: Any, targets: Any) -> Any:
    """The same, chunk by chunk."""
    return linear_cross_entropy(hidden, head, targets)["logps"]


def modes(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """What is timed."""
    return {
        "forward": f,
        "forward+backward": jax.value_and_grad(lambda hidden, head, targets: f(hidden, head, targets).mean(), (0, 1)),
    }


def share_of_logits(f: Callable[..., Any], width: int) -> float:
    """Memory beside arguments and results, over that of the logits."""
    shapes = ((MEMORY_TOKENS, width), jnp.float32), ((width, VOCAB), jnp.float32), ((MEMORY_TOKENS,), jnp.int32)
    memory = jax.jit(f).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / (4 * MEMORY_TOKENS * VOCAB)


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Of wall time and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (options.tokens, options.width))
    head = jax.random.normal(keys[1], (options.width, VOCAB)) * options.width**-0.5
    targets = jax.random.randint(keys[2], (options.tokens,), 0, VOCAB)
    forms = {"llm_jax": modes(ours), "plain": modes(plain)}
    print(f"{options.tokens} tokens, width {options.width}, vocabulary {VOCAB}; memory of {MEMORY_TOKENS} tokens\n")
    print("| | form | wall ms | CPU ms | memory / logits |\n|---|---|---|---|---|")
    for mode in forms["plain"]:
        calls = {name: jax.jit(form[mode]) for name, form in forms.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
        for turn in range(options.repeats + 1):
            for name, call in calls.items():
                taken = seconds(lambda call=call: call(hidden, head, targets))
                if turn:  # the first compiles
                    times[name].append(taken)
        for name, taken in times.items():
            cells = (f"{1e3 * sorted(t)[len(t) // 2]:.0f} ({1e3 * min(t):.0f})" for t in zip(*taken, strict=True))
            share = share_of_logits(forms[name][mode], options.width)
            print(f"| {mode} | {name} | {' | '.join(cells)} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
