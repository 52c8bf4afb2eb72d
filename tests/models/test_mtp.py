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
from transformers import AutoConfig

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.jobs.scoring import score_rows
from llm_jax.models import Decoder, ModelConfig, bind, family, init_params, load, save
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.flops import flops_per_token, training_flops_per_token
from llm_jax.models.loading import read_model_config
from tests.jobs.batches import Document, document_rows
from tests.oracles import family_recipe as recipe

FAMILIES = ("deepseek_v3", "nemotron_h")
GOLDEN = {name: np.load(Path(__file__).parents[1] / "golden" / "mtp" / f"{name}.npz") for name in FAMILIES}
METAS: dict[str, Any] = {name: json.loads(file["meta"].tobytes()) for name, file in GOLDEN.items()}
META, NEMOTRON = METAS["deepseek_v3"], METAS["nemotron_h"]
DEPTHS = {name: meta["config"]["num_nextn_predict_layers"] for name, meta in METAS.items()}
DEPTH = DEPTHS["deepseek_v3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """As they are published: DeepSeek's further layers come with a copy of embedding and head each."""
    paths = {}
    for name, meta in METAS.items():
        paths[name] = tmp_path_factory.mktemp(name)
        tensors = recipe.weights(name, meta["shapes"])
        for k in range(DEPTH if name == "deepseek_v3" else 0):
            at = f"model.layers.{META['config']['num_hidden_layers'] + k}."
            tensors[f"{at}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
            tensors[f"{at}shared_head.head.weight"] = tensors["lm_head.weight"]
        save_file(tensors, paths[name] / "model.safetensors")
        (paths[name] / "config.json").write_text(json.dumps(meta["config"]))
    return paths


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders["deepseek_v3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_equations_of_the_paper(folders, name):
    model, golden = load(folders[name]), GOLDEN[name]
    tokens = jnp.asarray(golden["tokens"], jnp.int32)
    T = tokens.shape[1]
    positions, ids = jnp.broadcast_to(jnp.arange(T), tokens.shape), jnp.ones_like(tokens)
    decoder = bind(model.decoder, model.params)
    hidden, _, _ = decoder(tokens, positions, ids)
    states, statistics = decoder.further(hidden, tokens, positions, ids)
    assert [f"further_{k + 1}" for k in range(DEPTHS[name])] == [key for key in golden if key.startswith("further")]
    for key, state in (("logits", hidden), *((f"further_{k}", state) for k, state in enumerate(states, start=1))):
        want = golden[key]
        got = np.asarray(decoder.logits(state))[:, : want.shape[1]]
        assert np.abs(got - want).max() <= 1e-4 * max(1.0, np.abs(want).max()), key
    # A token that has none k ahead is sent to no expert.
    np.testing.assert_array_equal(statistics["tokens"], [2 * (T - 1), 2 * (T - 2)][: DEPTHS[name]])


@pytest.mark.parametrize("name", FAMILIES)
def test_goes_back_unchanged(folders, tmp_path, name):
    model = load(folders[name])
    save(model, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folders[name], tmp_path))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[tensor], after[tensor]) for tensor in before)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == DEPTHS[name]
    assert read_model_config(tmp_path).resolved() == model.config


def test_layers_of_nemotron_h_may_be_absent(folders, tmp_path, capfd):
    """transformers reads and writes the model without them. Those that nobody speaks of are refused."""
    tensors, config = load_file(folders["nemotron_h"] / "model.safetensors"), NEMOTRON["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({n: t for n, t in tensors.items() if not n.startswith("mtp.")}, tmp_path / "model.safetensors")
    assert read_model_config(tmp_path).mtp == 0
    save(load(tmp_path), tmp_path / "again")
    assert "config.json speaks of 1 layers for further tokens" in "".join(capfd.readouterr())
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0 and not [name for name in written if name.startswith("mtp_")]
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    shutil.copy(folders["nemotron_h"] / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"has a tensor mtp\.layers\.\d\.\S+ that the nemotron_h family does not have"):
        load(tmp_path)


@pytest.mark.parametrize(
    "said, parts",
    [
        ({}, ("attention", "experts")),
        ({"mtp_layers_block_type": ["attention", "moe"]}, ("attention", "experts")),
        ({"mtp_hybrid_override_pattern": "*E"}, ("attention", "experts")),
        ({"mtp_hybrid_override_pattern": "M"}, ("mamba2", "none")),
        ({"mtp_hybrid_override_pattern": "E", "mtp_layers_block_type": ["full_attention", "moe"]}, ("none", "experts")),
    ],
)
def test_parts_of_nemotron_hs_layers(tmp_path, said, parts):
    """In the spellings of NVIDIA's folders and of transformers, which takes the pattern beside its default by name."""
    nemotron = family("nemotron_h")
    fields = {k: v for k, v in NEMOTRON["config"].items() if not k.startswith("mtp_")} | said
    config = nemotron.from_hf(fields)
    assert (config.mtp, config.mtp_mixer, config.mtp_feed_forward) == (1, *parts)
    written = nemotron.to_hf(config, {})
    assert nemotron.from_hf(written).resolved() == config.resolved()
    patterns = []
    for each in (fields, written):
        (tmp_path / "config.json").write_text(json.dumps(each))
        patterns.append(AutoConfig.from_pretrained(tmp_path).mtp_hybrid_override_pattern)
    assert patterns[0] == patterns[1]


@pytest.mark.parametrize(
    "said, message",
    [
        ({"mtp_hybrid_override_pattern": "E*"}, r"\(mtp_hybrid_override_pattern\) is moe, full_attention; read are"),
        ({"mtp_hybrid_override_pattern": "*M"}, "is full_attention, linear_attention; read are"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2: the nemotron_h family has one layer"),
        ({"mtp_hybrid_override_pattern": "*X"}, "mtp_hybrid_override_pattern has 'X'"),
        (
            {"mtp_hybrid_override_pattern": "*-"},
            "model.mtp_feed_forward=dense is of no layer of the model, which has experts, none",
        ),
        ({"mtp_hybrid_override_pattern": "*E", "mtp_layers_block_type": ["moe"]}, "say different things"),
    ],
)
def test_parts_that_are_refused(said, message):
    fields = {k: v for k, v in NEMOTRON["config"].items() if not k.startswith("mtp_")} | said
    with pytest.raises(UserError, match=message):
        family("nemotron_h").from_hf(fields)


def test_parts_of_layers_that_are_not_there():
    with pytest.raises(UserError, match=r"model.mtp_mixer=attention says nothing without model.mtp"):
        ModelConfig(vocab_size=32, mtp_mixer="attention").resolved()


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
