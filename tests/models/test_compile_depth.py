"""A scanned forward is one program whatever its depth: what the compiler is given, and the time it takes."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.parameter import abstract_params, bind
from tests.models.test_sharded_kinds import KINDS

PER_LAYER = ("mixers", "feed_forwards", "sights", "rope_layers")


def forward(kind: str, times: int) -> jax.stages.Lowered:
    """The forward of a kind's layers, repeated so many times, with the head's logits."""
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "head_dim": 8} | KINDS[kind]
    layers = fields["num_layers"] * times
    repeated = {name: tuple(fields[name]) * times for name in PER_LAYER if name in fields}
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, max_position_embeddings=64)
    decoder = Decoder(dataclasses.replace(config, **fields | repeated | {"num_layers": layers}))

    def run(params, tokens):
        bound = bind(decoder, params)
        return bound.logits(bound(tokens)[0])

    return jax.jit(run).lower(abstract_params(decoder), jax.ShapeDtypeStruct((2, 24), jnp.int32))


@pytest.mark.parametrize("kind", ["dense", "experts", "latent", "mamba", "mamba2", "hybrid", "llama4"])
def test_one_program_for_any_depth(kind):
    """Operations of 4 and of 32 times the layers: the same, in the same order."""

    def operations(lowered: jax.stages.Lowered) -> list[str]:
        return re.findall(r"stablehlo\.\w+", lowered.as_text())

    assert operations(forward(kind, 4)) == operations(forward(kind, 32))


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """jax looks once whether its compilation cache is in use, until it is reset."""
    was = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts", "mamba2", "hybrid"])
def test_time_to_compile(kind):
    """64 times the layers take no longer than 4 times; seconds of CPU time, the least of three, none from a cache."""
    found: dict[int, list[float]] = {4: [], 64: []}
    with without_cache():
        for times in (4, 64) * 3:
            lowered, begin = forward(kind, times), time.process_time()
            lowered.compile()
            found[times].append(time.process_time() - begin)
    few, many = min(found[4]), min(found[64])
    print(f"{kind}: {few:.2f} s for 4 times the layers, {many:.2f} s for 64")
    assert many < 1.25 * few + 0.05
