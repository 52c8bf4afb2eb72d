"""A layer of experts beside a dense layer of equal active flops, on this machine's CPU, float32.

    python experiments/benchmarks/experts_layer.py [--repeats 30]

8 experts, top-2, 2,048 tokens. Prints a Markdown table of the least wall time and of the median CPU time in
milliseconds. Calls of both alternate, so that a busy machine disturbs both alike.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

from llm_jax.base.runtime import prepare_runtime

TOKENS, WIDTH, INNER, EXPERTS, TOP_K = 2048, 512, 768, 8, 2


def calls() -> dict[tuple[str, str], Any]:
    """Compiled, by layer and mode."""
    import jax
    import jax.numpy as jnp

    from llm_jax.models.config import ModelConfig
    from llm_jax.models.experts import Experts
    from llm_jax.models.experts_config import ExpertsConfig
    from llm_jax.models.feed_forward import FeedForward
    from llm_jax.models.parameter import abstract_params, bind

    config = ModelConfig(
        vocab_size=2,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        experts=ExpertsConfig(num=EXPERTS, top_k=TOP_K),
    ).resolved()
    layers = {
        "dense": FeedForward(replace(config, intermediate_size=TOP_K * INNER)),
        "experts": Experts(config),
    }
    x = jax.random.normal(jax.random.key(0), (1, TOKENS, WIDTH))
    found = {}
    for name, layer in layers.items():
        params = jax.tree.map(lambda s: 0.03 * jax.random.normal(jax.random.key(1), s.shape), abstract_params(layer))

        def forward(params: Any, x: Any, layer: Any = layer) -> Any:
            out = bind(layer, params)(x)
            return out[0] if isinstance(out, tuple) else out

        def both(params: Any, x: Any, forward: Any = forward) -> Any:
            return jax.grad(lambda params, x: jnp.mean(forward(params, x) ** 2), (0, 1))(params, x)

        for mode, f in (("forward", forward), ("forward+backward", both)):
            run = jax.jit(f)
            found[name, mode] = lambda run=run, params=params: jax.block_until_ready(run(params, x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    prepare_runtime()
    found = calls()
    wall: dict[Any, list[float]] = {key: [] for key in found}
    cpu: dict[Any, list[float]] = {key: [] for key in found}
    for repeat in range(repeats + 1):
        for key, call in found.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            call()
            if repeat:
                wall[key].append(1e3 * (time.perf_counter() - begin))
                cpu[key].append(1e3 * (time.process_time() - begin_cpu))
    print("| | dense | experts | ratio | CPU dense | CPU experts | ratio |\n|---|---|---|---|---|---|---|")
    for mode in ("forward", "forward+backward"):
        least = [min(wall["dense", mode]), min(wall["experts", mode])]
        median = [statistics.median(cpu["dense", mode]), statistics.median(cpu["experts", mode])]
        cells = [f"{a:.1f} | {b:.1f} | {b / a:.2f}" for a, b in (least, median)]
        print(f"| {mode} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
