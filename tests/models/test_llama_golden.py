"""Equal to transformers: golden files of tests/oracles/transformers_llama.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import llm_jax
from llm_jax.adapters import loading
from llm_jax.models.cache import Meta, init_caches
from llm_jax.models.decoder import Decoder, unstack
from llm_jax.models.loading import Model, load
from llm_jax.models.parameter import bind
from llm_jax.models.saving import save
from tests.models.conftest import TESTS


@pytest.fixture(scope="module")
def case(llama, hf_folder):
    return llama, load(hf_folder(llama)), np.load(TESTS / "golden" / "llama" / f"{llama}.npz")


def test_logits(case, recipe):
    name, model, golden = case
    rows = recipe.packing(name) if name == "packed" else (None, None)
    logits = model(recipe.tokens(name), *rows)
    assert logits.dtype == jnp.float32
    largest = max(1.0, np.abs(golden["logits"]).max())
    np.testing.assert_array_less(np.abs(logits - golden["logits"]), 1e-4 * largest)


def test_gradients(case, recipe, tmp_path):
    name, model, golden = case
    tokens = recipe.tokens(name)
    positions, segments = recipe.packing(name)

    @jax.jit
    def grads(params):
        def loss(params):
            bound = bind(model.decoder, params)
            logits = bound.logits(bound(tokens, positions, segments)[0])
            logps = jax.nn.log_softmax(logits[:, :-1])
            nll = -jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1).mean()
            return nll + (recipe.logit_weights(name) * logits).mean()

        return jax.value_and_grad(loss)(params)

    loss, ours = grads(model.params)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    # Saved as if they were weights: gives them their Hugging Face names and layout.
    save(Model(model.decoder, ours, model.config), tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = {key.removeprefix("grad/"): golden[key] for key in golden.files if key.startswith("grad/")}
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        error = np.linalg.norm(ours[tensor] - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, (tensor, error)


def test_greedy_tokens(case, recipe):
    """32 tokens through the cache, identical up to the first near-tie."""
    name, model, golden = case
    decoder = Decoder(model.config, segments="unrolled")
    params = unstack(model.params, model.decoder)
    tokens = jnp.asarray(recipe.tokens(name)[:, : recipe.PROMPT])

    @jax.jit
    def step(params, tokens, caches, start):
        bound = bind(decoder, params)
        positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, caches, _ = bound(tokens, caches=caches, meta=Meta(positions))
        return jnp.argmax(bound.logits(hidden[:, -1:])[:, 0], axis=-1)[:, None], caches

    caches = init_caches(model.config, recipe.BATCH, recipe.PROMPT + recipe.NEW_TOKENS)
    start, ours = 0, []
    for _ in range(recipe.NEW_TOKENS):
        new, caches = step(params, tokens, caches, start)
        start, tokens = start + tokens.shape[1], new
        ours.append(np.asarray(new))
    clear = np.logical_and.accumulate(golden["gaps"] > 1e-3, axis=1)
    assert clear.sum() > 32
    np.testing.assert_array_equal(np.where(clear, np.concatenate(ours, 1), 0), np.where(clear, golden["greedy"], 0))


def test_public_names():
    assert llm_jax.load is loading.load and llm_jax.save is loading.save and llm_jax.Model is Model
