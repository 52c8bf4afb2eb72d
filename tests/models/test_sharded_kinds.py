"""A model of each kind of layer, and a hybrid of them: loss and gradients on a mesh equal those of one device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.head import token_scores
from llm_jax.models.init import init_params
from llm_jax.models.latent_config import LatentConfig
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import abstract_params, bind, declarations
from llm_jax.sharding import MeshConfig, make_plan, storage_shardings, use

VOCAB, ROWS, LENGTH = 64, 8, 24
ALONE: dict[str, Any] = {"feed_forwards": ("none",) * 2, "positions": "none"}
LLAMA4: dict[str, Any] = {"scores": "sigmoid", "normalize": False, "weigh": "input"}
NEMOTRON: dict[str, Any] = {"scores": "sigmoid", "correction_bias": True, "group_score": "top2", "scale": 2.5}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"num_kv_heads": 2},
    "experts": {"experts": ExpertsConfig(num=4, top_k=2, intermediate_size=24, shared_size=16)},
    "latent": {"latent": LatentConfig(kv_rank=8, q_rank=12, nope_dim=6, rope_dim=4, value_dim=6), "head_dim": 4},
    "gpt_oss": {
        "sights": ("sliding", "full"),
        "window": 6,
        "sinks": True,
        "attention_bias": True,
        "experts": ExpertsConfig(num=4, top_k=2, intermediate_size=24, bias=True, router_bias=True, limit=1.0),
    },
    "llama4": {
        "sights": ("chunked", "full"),
        "chunk": 8,
        "rope_layers": (True, False),
        "qk_norm": "plain",
        "query_growth": 0.5,
        "query_growth_every": 4,
        "experts": ExpertsConfig(num=4, top_k=1, intermediate_size=24, shared_size=16, **LLAMA4),
    },
    "mamba": {
        "mixers": ("mamba",) * 2,
        "mamba": MambaConfig(inner_size=64, state_size=5, dt_rank=3, selection_norm="weighted"),
    }
    | ALONE,
    "mamba2": {
        "mixers": ("mamba2",) * 2,
        "mamba": MambaConfig(inner_size=64, state_size=5, num_heads=8, num_groups=2),
    }
    | ALONE,
    "hybrid": {
        "num_layers": 4,
        "mixers": ("mamba2", "none", "attention", "none"),
        "feed_forwards": ("none", "experts", "none", "dense"),
        "mamba": MambaConfig(inner_size=64, state_size=5, num_heads=8, num_groups=1, dt_min=1e-3),
        "experts": ExpertsConfig(num=4, top_k=2, intermediate_size=24, shared_size=16, latent_size=12, **NEMOTRON),
        "positions": "none",
        "gated": False,
        "activation": "relu2",
    },
}


FAST = ("latent", "mamba", "hybrid")
"""Which have every kind of layer between them."""


def packed_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and segment ids: two or three documents in a row, then padding."""
    draw = np.random.RandomState(0)
    segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        lengths = ([7, 5, 9], [20], [3, 21], [1, 10, 4])[row % 4]
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        positions[row, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
    return draw.randint(0, VOCAB, (ROWS, LENGTH)).astype(np.int32), positions, segments


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in KINDS])
def test_a_mesh_equals_one_device(kind):
    """Data 4 x tensor 2, ZeRO-3, packed rows."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    decoder = Decoder(ModelConfig(family="llm_jax", init_std=0.2, **{**sizes, "num_layers": 2, **KINDS[kind]}))
    params = init_params(decoder, 0)
    tokens, positions, segments = map(jnp.asarray, packed_rows())
    goes_on = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    mask = jnp.pad(goes_on, ((0, 0), (0, 1)))

    def value_and_grads(params):
        def loss(params):
            bound = bind(decoder, params)
            hidden = bound(tokens, positions, segments)[0]
            return -token_scores(bound, hidden, jnp.roll(tokens, -1, 1), mask)["logps"].sum() / mask.sum()

        return jax.value_and_grad(loss)(params)

    value, grads = jax.jit(value_and_grads)(params)
    plan = make_plan(MeshConfig(data=4, tensor=2, zero=3))
    placed = jax.device_put(params, storage_shardings(declarations(decoder), abstract_params(decoder), plan))
    with use(plan):
        sharded_value, sharded = jax.jit(lambda params: value_and_grads(params))(placed)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    for (path, ours), want in zip(jax.tree.leaves_with_path(sharded), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(np.asarray(ours) - want) <= 1e-5 * np.linalg.norm(want), path
