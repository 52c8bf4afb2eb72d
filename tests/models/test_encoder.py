"""Attention to both sides: within a document and its window, packed as alone, without a cache; a head with a bias."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.inference import Generator
from llm_jax.models import HeadConfig, Model, ModelConfig, bind, init_params, token_scores
from llm_jax.models.cache import init_caches
from llm_jax.models.decoder import Decoder
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.sharding import MeshConfig, make_plan, use

CONFIG = ModelConfig(
    family="llm_jax",
    vocab_size=32,
    hidden_size=24,
    intermediate_size=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    causal=False,
    window=3,
    sights=("sliding", "full", "sliding"),
    local_rope_theta=100.0,
    embed_norm=True,
    first_norm=False,
    norm="layer_unbiased",
    activation="gelu",
    tie_embeddings=True,
    head=HeadConfig(bias=True, transform=True, transform_bias=True, transform_activation="relu"),
    init_std=0.3,
)
DECODER = Decoder(CONFIG)
TOKENS = jnp.array(np.random.default_rng(0).integers(0, 32, (2, 24)), jnp.int32)
SEGMENTS = jnp.array([[1] * 9 + [0] + [2] * 11 + [0] * 3, [1] * 24])
POSITIONS = jnp.array([[*range(9), 0, *range(11), 0, 0, 0], [*range(24)]])


@pytest.fixture(scope="module")
def model():
    params = init_params(DECODER, 0)
    bias = {"bias": jnp.sin(jnp.arange(32.0))}
    return Model(DECODER, params | {"vocab_bias": bias}, DECODER.config)


def test_packed_equals_alone(model):
    packed = model(TOKENS, POSITIONS, SEGMENTS)
    for start, stop in ((0, 9), (10, 21)):
        np.testing.assert_allclose(packed[0, start:stop], model(TOKENS[:1, start:stop])[0], atol=1e-5)


def test_what_is_seen(model):
    """A token's change reaches as far as the windows of the layers: 2, all, 2 tokens; without the full layer, 4."""
    other = TOKENS.at[1, 12].set((TOKENS[1, 12] + 1) % 32)

    def changed(config: ModelConfig) -> list[int]:
        decoder = Decoder(config)
        params = init_params(decoder, 0)
        run = jax.jit(lambda tokens: bind(decoder, params)(tokens)[0])
        return np.flatnonzero(np.abs(run(TOKENS) - run(other)).max(-1)[1] > 1e-6).tolist()

    assert changed(CONFIG) == list(range(24))
    near = dataclasses.replace(CONFIG, num_layers=2, sights=("sliding", "sliding"))
    assert changed(near) == list(range(8, 17))


def test_the_first_layer_has_no_norm(model):
    """And so a segment of its own."""
    assert [segment.num_layers for segment in DECODER.groups] == [1, 1, 1]
    deep = dataclasses.replace(CONFIG, num_layers=7, sights=("full", "sliding", "sliding") * 2 + ("full",))
    assert [(segment.num_layers, len(segment.block)) for segment in Decoder(deep).groups] == [(1, 1), (6, 3)]
    assert "attention_norm" not in model.params["segments"]["0"]["0"]
    assert "attention_norm" in model.params["segments"]["1"]["0"]


@pytest.mark.parametrize("tied, mesh", [(False, None), (True, MeshConfig(data=2, tensor=2))], ids=["one", "mesh"])
def test_scores_of_given_tokens(model, tied, mesh):
    """Without the logits of the whole batch, the bias and the projection before it included; gradients too."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    decoder = Decoder(config)
    params = init_params(decoder, 0) | {"vocab_bias": model.params["vocab_bias"]}
    mask = jnp.array(np.random.default_rng(1).random(TOKENS.shape) < 0.6)

    def loss(params, chunked):
        bound = bind(decoder, params)
        hidden, _, _ = bound(TOKENS, POSITIONS, SEGMENTS)
        if chunked:
            return token_scores(bound, hidden, TOKENS, mask)["logps"].sum()
        logps = jax.nn.log_softmax(bound.logits(hidden))
        return jnp.where(mask, jnp.take_along_axis(logps, TOKENS[..., None], -1)[..., 0], 0.0).sum()

    expected = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, False)
    with use(None if mesh is None else make_plan(mesh)):
        found = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, True)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-6), found[1], expected[1]
    )


def test_no_cache_and_no_generation(model):
    with pytest.raises(UserError, match="encoder .* has no cache"):
        init_caches(CONFIG, 1, 8)
    with pytest.raises(UserError, match=r"generation needs a model that predicts next tokens; an encoder"):
        Generator(model)


def test_encoders_have_attention_only():
    mamba = MambaConfig(inner_size=48, state_size=4, dt_rank=2)
    mixed = dataclasses.replace(CONFIG, mixers=("attention", "mamba", "attention"), mamba=mamba)
    with pytest.raises(UserError, match="causal=False needs attention in all layers"):
        mixed.resolved()
