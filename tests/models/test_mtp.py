"""Multi-token prediction: equal to DeepSeek-V3's equations, a folder both ways, documents of a packed row apart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.jobs.scoring import score_rows
from llm_jax.models import Decoder, ModelConfig, bind, family, init_params, load, save
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.flops import flops_per_token, training_flops_per_token
from llm_jax.models.loading import read_model_config
from tests.jobs.batches import Document, document_rows
from tests.oracles import family_recipe as recipe

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "mtp.npz")
META: dict[str, Any] = json.loads(GOLDEN["meta"].tobytes())
DEPTH = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As DeepSeek publishes it: each further layer with a copy of embedding and head."""
    path = tmp_path_factory.mktemp("mtp")
    tensors = recipe.weights("deepseek_v3", META["shapes"])
    layers = META["config"]["num_hidden_layers"]
    for k in range(DEPTH):
        for name, source in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            tensors[f"model.layers.{layers + k}.{name}.weight"] = tensors[f"{source}.weight"]
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(META["config"]))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def test_equals_the_equations_of_the_paper(model):
    tokens = jnp.asarray(GOLDEN["tokens"], jnp.int32)
    T = tokens.shape[1]
    positions, ids = jnp.broadcast_to(jnp.arange(T), tokens.shape), jnp.ones_like(tokens)
    decoder = bind(model.decoder, model.params)
    hidden, _, _ = decoder(tokens, positions, ids)
    states, statistics = decoder.further(hidden, tokens, positions, ids)
    for name, state in (("logits", hidden), *((f"further_{k + 1}", states[k]) for k in range(DEPTH))):
        want = GOLDEN[name]
        got = np.asarray(decoder.logits(state))[:, : want.shape[1]]
        assert np.abs(got - want).max() <= 1e-4 * max(1.0, np.abs(want).max()), name
    # A token that has none k ahead is sent to no expert.
    np.testing.assert_array_equal(statistics["tokens"], [2 * (T - 1), 2 * (T - 2)])


def test_goes_back_unchanged(model, folder, tmp_path):
    save(model, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == DEPTH


def test_the_layers_may_be_absent_and_their_copies_too(folder, tmp_path, capfd):
    """transformers saves neither; an export may leave out the copies. What config.json says of absent layers is known
    to be left behind."""
    tensors, last = load_file(folder / "model.safetensors"), META["config"]["num_hidden_layers"]
    for name, wanted, gone in (
        ("layers", 0, f"model.layers.{last}"),
        ("copies", DEPTH, ("embed_tokens", "head.weight")),
    ):
        path = tmp_path / name
        path.mkdir()
        shutil.copy(folder / "config.json", path)
        further = [n for n in tensors if n.startswith((f"model.layers.{last}", f"model.layers.{last + 1}"))]
        left_out = [n for n in further if name == "layers" or any(part in n for part in gone)]
        save_file({n: t for n, t in tensors.items() if n not in left_out}, path / "model.safetensors")
        assert read_model_config(path).mtp == load(path).config.mtp == wanted
        assert ("config.json speaks of 2 layers for further tokens" in "".join(capfd.readouterr())) == (not wanted)


def test_copies_that_differ_are_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.{META['config']['num_hidden_layers']}.embed_tokens.weight"
    tensors[name] = tensors[name] + 1
    shutil.copy(folder / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        load(tmp_path)


def test_packed_documents_equal_one_per_row():
    experts = ExpertsConfig(num=4, top_k=2)
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=16, num_layers=2, mtp=2, experts=experts)
    decoder = Decoder(config)
    bound = bind(decoder, init_params(decoder, 0))
    random = np.random.default_rng(0)
    documents = [Document(random.integers(64, size=n), np.ones(n, bool)) for n in (7, 2, 1, 6)]

    def logps(rows):
        scores, _ = score_rows(bound, rows, ("logps",), further=True)
        ids = rows["segment_ids"]
        order = [(row, n) for row in range(len(ids)) for n in range(1, ids[row].max() + 1)]
        each = (scores["logps"], *scores["logps_further"])
        return [[np.asarray(x)[row][ids[row] == n] for x in each] for row, n in order]

    packed = logps(document_rows([documents[:2], documents[2:]], 10))
    alone = logps(document_rows([[d] for d in documents], 10))
    for got, want in zip(packed, alone, strict=True):
        for by, (a, b) in enumerate(zip(got, want), start=1):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            assert (b != 0).sum() == max(len(b) - by, 0)


def test_flops_of_further_tokens():
    """In training alone: a layer, a projection from 2 D and the head once more, for each."""
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4)
    with_further = ModelConfig(**{**config.__dict__, "mtp": 2})
    T, D = 10, 32
    assert flops_per_token(with_further, T) == flops_per_token(config, T)
    layer = 2 * (4 * D * D + 3 * D * 48) + 4 * D * (T + 1) / 2
    more = 2 * (layer + 2 * (2 * D * D) + 2 * D * 64)
    assert training_flops_per_token(with_further, T, True) == 3 * (flops_per_token(config, T) + more)
    assert training_flops_per_token(with_further, T, False) == training_flops_per_token(config, T, False)
    assert not any(path.startswith("mtp") for path in flatten(init_params(Decoder(config), 0)))


@pytest.mark.parametrize("name", ["num_layers", "mtp"])
def test_more_layers_than_any_model_has_are_refused_at_once(name):
    """Before a list with an entry for each is made."""
    with pytest.raises(UserError, match=rf"model\.{name} is 1000000, it has to be from"):
        replace(ModelConfig(vocab_size=32), **{name: 10**6}).resolved()


def test_a_file_with_too_many_further_layers():
    hf = {**META["config"], "num_nextn_predict_layers": 10**7}
    with pytest.raises(UserError, match=r"model\.mtp is 10000000"):
        family("deepseek_v3").from_hf(hf)
