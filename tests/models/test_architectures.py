"""Whatever a decoder is put together from: packed = alone, cached = full, ragged = alone, scanned = unrolled."""

import random
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.cache import Meta, init_caches, known_empty
from llm_jax.models.config import ModelConfig, RopeScaling
from llm_jax.models.decoder import unstack
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families import family
from llm_jax.models.latent_config import LatentConfig
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import bind
from tests.models.cached import cached_model

LAYERS, HEADS = 3, 4
LATENT = (20, 21)
"""Seeds of models with latent attention."""
FAST = (*range(6), LATENT[0])
TOKENS = np.random.RandomState(0).randint(0, 61, (3, 24)).astype(np.int32)
LENGTHS = np.array([9, 24, 5], np.int32)
BOUND = 1e-5
SCALINGS = (
    None,
    RopeScaling("linear", 2.0),
    RopeScaling("yarn", 4.0, original_length=8),
    RopeScaling("llama3", 4.0, original_length=8),
)
CORRECTED: Any = {"scores": "sigmoid", "correction_bias": True, "group_score": "top2", "scale": 1.5}
EXPERTS = (
    ExpertsConfig(num=5, top_k=2, bias=True, router_bias=True),
    ExpertsConfig(num=4, top_k=1, scores="sigmoid", normalize=False, weigh="input", shared_size=10),
    ExpertsConfig(num=6, top_k=3, groups=3, top_groups=2, shared_size=12, shared_gate=True, **CORRECTED),
    ExpertsConfig(num=4, top_k=2, normalize=False, latent_size=10),
)


def with_experts(config: ModelConfig, seed: int) -> ModelConfig:
    """The same with a mixture of experts in one layer or more."""
    draw = random.Random(seed)
    kinds: list[Any] = ["experts", *(draw.choice(["dense", "experts"]) for _ in range(LAYERS - 1))]
    return replace(config, feed_forwards=tuple(draw.sample(kinds, LAYERS)), experts=draw.choice(EXPERTS))


def drawn(seed: int) -> ModelConfig:
    """A random combination of what layers can be."""
    draw = random.Random(seed)
    positions: Any = draw.choice(["rope", "rope", "rope", "alibi", "learned", "sinusoidal", "none"])
    sights: list[Any] = ["full", "full", "sliding", "chunked"]
    fields: dict[str, Any] = {}
    if positions == "rope":
        fields = {
            "rope_interleaved": draw.random() < 0.5,
            "rope_dim": draw.choice([None, 2, 4]),
            "rope_layers": tuple(draw.random() < 0.7 for _ in range(LAYERS)),
            "local_rope_theta": draw.choice([None, 100.0]),
            "rope_scaling": draw.choice(SCALINGS),
        }
    config = ModelConfig(
        family="llm_jax",
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=draw.choice([1, 2, 4]),
        head_dim=6,
        max_position_embeddings=32,
        window=draw.choice([3, 7]),
        chunk=draw.choice([4, 5]),
        sights=tuple(draw.choice(sights) for _ in range(LAYERS)),
        positions=positions,
        norm=draw.choice(["rms", "rms_offset", "layer", "layer_unbiased"]),
        norm_at=draw.choice(["pre", "output", "sandwich", "post"]),
        parallel=draw.choice(["no", "no", "one_norm", "two_norms"]),
        embed_norm=draw.random() < 0.3,
        embed_scale=draw.choice([1.0, 3.0]),
        residual_scale=draw.choice([1.0, 0.5]),
        logit_scale=draw.choice([1.0, 0.3]),
        logit_softcap=draw.choice([None, 5.0]),
        tie_embeddings=draw.random() < 0.5,
        qk_norm=draw.choice(["none", "head", "whole"]),
        query_scale=draw.choice([None, 0.3]),
        attention_softcap=draw.choice([None, 4.0]),
        sinks=draw.random() < 0.5,
        attention_bias=draw.random() < 0.5,
        output_bias=draw.choice([None, True]),
        activation=draw.choice(["silu", "gelu", "gelu_tanh", "relu", "relu2"]),
        gated=draw.random() < 0.5,
        mlp_bias=draw.random() < 0.5,
        init_std=0.2,
        **fields,
    )
    if seed in LATENT:
        return replace(config, **latent(draw))
    gate: Any = random.Random(3000 + seed).choice(["none", "head", "element"])
    own = {**hybrid(random.Random(1000 + seed)), **llama4(random.Random(2000 + seed), config)}
    return replace(config, attention_gate=gate, **own)


def latent(draw: random.Random) -> dict[str, Any]:
    """Latent attention in all layers, and nothing that it has no place for."""
    return {
        "latent": LatentConfig(kv_rank=7, q_rank=draw.choice([None, 5]), nope_dim=3, rope_dim=4, value_dim=5),
        "positions": "rope",
        "head_dim": 4,
        "rope_dim": None,
        "rope_layers": None,
        "local_rope_theta": None,
        "rope_scaling": RopeScaling("yarn", 4.0, original_length=8, mscale=1.0, mscale_all_dim=0.7),
        "sights": None,
        "window": None,
        "qk_norm": "none",
        "sinks": False,
        "attention_softcap": None,
    }


def llama4(draw: random.Random, config: ModelConfig) -> dict[str, Any]:
    """In one model of two, what it does to queries and keys."""
    if draw.random() < 0.5:
        return {}
    plain = {"qk_norm": "plain"} if config.positions == "rope" else {}
    return {**plain, "query_growth": 0.5, "query_growth_every": 6}


def hybrid(draw: random.Random) -> dict[str, Any]:
    """Two models in three have state-space layers among others, or layers of one sublayer only."""
    kind: Any = draw.choice(["attention", "mamba", "mamba2"])
    if kind == "attention":
        return {}
    mixers = [kind, *(draw.choice([kind, kind, "attention", "none"]) for _ in range(LAYERS - 1))]
    mamba = MambaConfig(
        inner_size=24,
        state_size=5,
        conv_width=draw.choice([2, 4]),
        conv_bias=draw.random() < 0.5,
        activation=draw.choice(["silu", "relu"]),
        bias=draw.random() < 0.5,
        dt_rank=3 if kind == "mamba" else 0,
        num_heads=6 if kind == "mamba2" else 0,
        num_groups=draw.choice([1, 2, 3]) if kind == "mamba2" else 1,
        selection_norm=draw.choice(["none", "plain", "weighted"]) if kind == "mamba" else "none",
        dt_min=draw.choice([0.0, 0.05]),
        dt_max=draw.choice([None, 0.5]),
        chunk_size=draw.choice([None, 5]),
    )
    feeds = tuple(draw.choice(["dense", "none"]) for _ in range(LAYERS))
    return {"mixers": tuple(draw.sample(mixers, LAYERS)), "mamba": mamba, "feed_forwards": feeds, "parallel": "no"}


def noisy(params: dict[str, Any]) -> dict[str, Any]:
    """Biases, norms and sinks drawn too: at their starting values an error in them can't show."""
    draw = np.random.RandomState(1)
    return {
        name: noisy(value) if isinstance(value, dict) else value + draw.normal(0, 0.1, value.shape).astype(np.float32)
        for name, value in params.items()
    }


@pytest.mark.parametrize("seed", [pytest.param(s, marks=() if s in FAST else pytest.mark.slow) for s in range(22)])
def test_every_way_of_running_it_agrees(seed):
    config = drawn(seed)
    config = with_experts(config, seed) if seed % 2 else config
    model = cached_model(config)
    params = noisy(model.params)
    unstacked = unstack(params, model.decoder)

    @jax.jit
    def full(tokens: np.ndarray, segments: Any = None, positions: Any = None) -> Any:
        decoder = bind(model.decoder, params)
        return decoder.logits(decoder(jnp.asarray(tokens), positions, segments)[0])

    alone = [np.asarray(full(TOKENS[b : b + 1, :n])[0]) for b, n in enumerate(LENGTHS)]
    largest = max(np.abs(x).max() for x in alone)

    def close(ours: Any, theirs: np.ndarray) -> None:
        assert np.abs(np.asarray(ours) - theirs).max() <= BOUND * max(1.0, largest)

    # Packed: all three documents in a row, with padding at its end.
    row = np.concatenate([TOKENS[b, :n] for b, n in enumerate(LENGTHS)] + [np.zeros(4, np.int32)])[None]
    if config.positions != "learned":  # Of which there are fewer than tokens in this row.
        segments = np.repeat([1, 2, 3, 0], [*LENGTHS, 4])[None].astype(np.int32)
        positions = np.concatenate([np.arange(n) for n in (*LENGTHS, 4)])[None].astype(np.int32)
        packed = full(row, jnp.asarray(segments), jnp.asarray(positions))[0]
        starts = np.cumsum([0, *LENGTHS])
        for b, n in enumerate(LENGTHS):
            close(packed[starts[b] : starts[b] + n], alone[b])

    # Cached: ragged prompts at once, a few more tokens at once, then one at a time.
    prompts = np.array([4, 9, 2], np.int32)
    logits = {b: [] for b in range(3)}

    def run(caches: Any, begin: np.ndarray, end: np.ndarray) -> Any:
        width = int((end - begin).max())
        index = begin[:, None] + np.arange(width)
        real = (index < end[:, None]).astype(np.int32)
        tokens = np.take_along_axis(TOKENS, np.minimum(index, TOKENS.shape[1] - 1), 1)
        meta = Meta(jnp.asarray(index), jnp.asarray(real) if width > 1 else None, jnp.asarray(begin))
        out, caches = model.step(unstacked, jnp.asarray(tokens), caches, meta)
        for b in range(3):
            logits[b].append(np.asarray(out[b, : end[b] - begin[b]]))
        return caches

    caches = run(tuple(map(known_empty, init_caches(config, 3, 32))), np.zeros(3, np.int32), prompts)
    caches = run(caches, prompts, np.array([7, 12, 3]))
    for step in range(2):
        begin = np.array([7, 12, 3]) + step
        caches = run(caches, begin, begin + 1)
    for b in range(3):
        done = np.concatenate(logits[b])
        close(done, alone[b][: len(done)])


@pytest.mark.parametrize("seed", range(0, 22, 5))
def test_our_own_family_says_all_of_it(seed):
    config = drawn(seed)
    own = family("llm_jax")
    assert own.from_hf(own.to_hf(config, {})).resolved() == config.resolved()
    own.check(config)
