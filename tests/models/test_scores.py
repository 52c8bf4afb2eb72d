"""Models that end in scores: equal to transformers' (golden file of tests/oracles/transformers_heads.py and that of
ModernBERT), packed as each alone, saved as they came, and made of models that end in the vocabulary."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import convert
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.inference import Generator
from llm_jax.models import HeadConfig, ModelConfig, with_head
from llm_jax.models.decoder import Decoder
from llm_jax.models.families import FAMILIES, family
from llm_jax.models.init import init_params
from llm_jax.models.loading import Model, load
from llm_jax.models.pooling import pool
from llm_jax.models.saving import save, save_native
from llm_jax.sharding.config import MeshConfig
from tests.models.conftest import TESTS
from tests.oracles import family_recipe, heads_recipe

FILE = np.load(TESTS / "golden" / "heads.npz")
META = json.loads(FILE["meta"].tobytes())["cases"]
CLASSES = json.loads(FILE["meta"].tobytes())["classes"]
PACKED = ("llama/sequence", "llama/token", "gemma2/sequence", "mixtral/sequence")
CONFIG = ModelConfig(vocab_size=32, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=4, init_std=0.3)


def write(folder, config, tensors):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Case:
    def __init__(self, name, folder):
        fam, kind = name.split("/")
        self.meta = META[name]
        self.weights = family_recipe.weights(fam, self.meta["shapes"])
        self.tokens, self.segments = heads_recipe.tokens(fam), heads_recipe.segment_ids()
        self.expected = FILE[f"{name}/scores"][:, None] if kind == "sequence" else FILE[f"{name}/scores"]
        self.pooled = kind == "sequence"
        self.model = load(write(folder, self.meta["config"], self.weights))


@pytest.fixture(scope="module", params=list(META))
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("scores"))


def test_equal_to_transformers(case):
    """The second row ends in padding."""
    ours = case.model.scores(case.tokens, None, case.segments)
    ours = ours if case.pooled else np.where(case.segments[..., None] > 0, ours, 0.0)
    assert ours.shape == case.expected.shape and ours.dtype == np.float32
    assert np.abs(ours - case.expected).max() <= 1e-4 * max(1.0, np.abs(case.expected).max())


@pytest.mark.parametrize(
    "case", ["llama/sequence", "llama/token", "gemma2/sequence", "mixtral/sequence"], indirect=True
)
def test_packed_equals_alone(case):
    """Both documents in one row, padding between and after them, and none of a third."""
    lengths, gap = heads_recipe.LENGTHS, 3
    tokens, segments, positions = np.zeros((3, 1, sum(lengths) + 2 * gap), np.int32)
    places = []
    for document, length in enumerate(lengths):
        start = document * (lengths[0] + gap)
        places.append(slice(start, start + length))
        tokens[0, places[-1]] = case.tokens[document, :length]
        segments[0, places[-1]], positions[0, places[-1]] = document + 1, np.arange(length)
    packed = case.model.scores(tokens, positions, segments, documents=3)[0]
    alone = case.model.scores(case.tokens, None, case.segments)
    if case.pooled:
        np.testing.assert_array_equal(packed[2], 0.0)
    for document in range(2):
        together = packed[document : document + 1] if case.pooled else packed[places[document]]
        np.testing.assert_allclose(together, alone[document, : len(together)], atol=1e-5)


def test_saved_as_it_came(case, tmp_path):
    save(case.model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == case.weights.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, case.weights[name])
    again = json.loads((tmp_path / "config.json").read_text())
    names = ("architectures", "id2label", "label2id")
    assert {name: again.get(name) for name in names} == {name: case.meta["config"].get(name) for name in names}
    assert load(tmp_path).config == case.model.config


@pytest.mark.parametrize("case", ["gpt_neox/token", "modernbert/sequence"], indirect=True)
def test_convert_there_and_back(case, tmp_path, capsys):
    save(case.model, tmp_path / "hf")
    convert.main([str(tmp_path / "hf"), str(tmp_path / "native"), "--verify"])
    convert.main([str(tmp_path / "native"), str(tmp_path / "again"), "--verify"])
    assert capsys.readouterr().out.count("verify: scores differ by 0.0e+00") == 2
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_is_no_language_model(case):
    with pytest.raises(UserError, match=r"ends in scores \(model.head.labels="):
        case.model(case.tokens)
    with pytest.raises(UserError, match="generation needs a model that predicts next tokens; "):
        Generator(case.model)


@pytest.mark.parametrize("name", ["plain", "biases"])
def test_modernbert_classes(name, tmp_path):
    """Read at the first token, or the mean of all; also packed."""
    golden = np.load(TESTS / "golden" / "families" / "modernbert.npz")
    meta = json.loads(golden["meta"].tobytes())["configs"][name]
    config = {**meta["new"], "architectures": ["ModernBertForSequenceClassification"]}
    shapes = {n: s for n, s in meta["shapes"].items() if not n.startswith("decoder.")}
    shapes |= {"classifier.weight": (3, config["hidden_size"]), "classifier.bias": (3,)}
    weights = family_recipe.weights("modernbert", shapes)
    model = load(write(tmp_path, config, weights))
    tokens, seen, expected = golden[f"{name}/tokens"], family_recipe.seen("modernbert"), golden[f"{name}/classes"]
    ours = model.scores(tokens, None, seen)
    np.testing.assert_allclose(ours[:, 0], expected, atol=1e-4 * max(1.0, np.abs(expected).max()))
    row = np.concatenate([tokens[0, seen[0]], tokens[1, seen[1]]])[None]
    segments = np.repeat([1, 2], seen.sum(1))[None]
    positions = np.concatenate([np.arange(n) for n in seen.sum(1)])[None]
    np.testing.assert_allclose(model.scores(row, positions, segments, documents=2)[0], ours[:, 0], atol=1e-5)
    save(model, tmp_path / "again")
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    assert tensors.keys() == weights.keys()
    assert all(np.array_equal(tensors[name], weights[name]) for name in weights)
    assert load(tmp_path / "again").config == model.config


def test_pooling_by_hand():
    hidden = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    ids = np.array([[1, 1, 0, 2, 2, 2, 0], [0, 0, 2, 2, 3, 0, 0]])
    members = {(0, 0): [0, 1], (0, 1): [3, 4, 5], (1, 1): [2, 3], (1, 2): [4]}
    ways = {"last": lambda x: x[-1], "first": lambda x: x[0], "mean": lambda x: x.astype(np.float64).mean(0)}
    for how, by_hand in ways.items():
        pooled, there = pool(jnp.array(hidden), jnp.array(ids), 3, how)  # pyright: ignore[reportArgumentType]
        want = np.zeros((2, 3, 5))
        for (row, document), places in members.items():
            want[row, document] = by_hand(hidden[row, places])
        np.testing.assert_allclose(pooled, want, atol=1e-6 if how == "mean" else 0.0)
        np.testing.assert_array_equal(there, [[(row, document) in members for document in range(3)] for row in (0, 1)])
        half, _ = pool(jnp.array(hidden, jnp.bfloat16), None, 1, how)  # pyright: ignore[reportArgumentType]
        assert half.dtype == jnp.bfloat16 and half.shape == (2, 1, 5)


@pytest.fixture(scope="module")
def base():
    decoder = Decoder(CONFIG)
    return Model(decoder, init_params(decoder, 3), decoder.config, extra={"bos_token_id": 1, "id2label": {"0": "x"}})


TOKENS = np.arange(22, dtype=np.int32).reshape(2, 11)


def test_a_new_head(base, tmp_path):
    """All else is the language model's, the head that of a new model; saved it is a folder for classification."""
    reward = with_head(base, HeadConfig(labels=1), seed=5)
    ours, theirs = flatten(reward.params), flatten(base.params)
    assert ours.keys() - theirs.keys() == {"score/weight"} and theirs.keys() - ours.keys() == {"head/weight"}
    assert all(leaf is theirs[path] for path, leaf in ours.items() if path in theirs)
    new = init_params(Decoder(dataclasses.replace(CONFIG, head=HeadConfig(labels=1))), 5)
    np.testing.assert_array_equal(ours["score/weight"], new["score"]["weight"])
    save(reward, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"] and fields["id2label"] == {"0": "LABEL_0"}
    assert load_file(tmp_path / "model.safetensors")["score.weight"].shape == (1, 24)
    np.testing.assert_array_equal(load(tmp_path).scores(TOKENS), reward.scores(TOKENS))


def test_a_value_head_reads_what_a_reward_head_does(base):
    """Of each token what the text up to it would have got; its parameters are the reward model's."""
    reward = with_head(base, HeadConfig(labels=1))
    value = with_head(reward, HeadConfig(labels=1, pooling="none"))
    assert value.params["score"]["weight"] is reward.params["score"]["weight"]
    values = value.scores(TOKENS)
    assert values.shape == (2, 11, 1)
    for end in (4, 11):
        np.testing.assert_allclose(values[:, end - 1], reward.scores(TOKENS[:, :end])[:, 0], atol=1e-5)


def test_native_folders(base, tmp_path):
    value = with_head(base, HeadConfig(labels=2, pooling="none"))
    save_native(value, tmp_path)
    again = load(tmp_path)
    assert again.config == value.config
    np.testing.assert_array_equal(again.scores(TOKENS), value.scores(TOKENS))
    with pytest.raises(UserError, match="none of the llama family's"):
        save(value, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_on_a_mesh(base, tmp_path):
    """Stored in parts, a new head too; the same scores."""
    save(base, tmp_path)
    reward = with_head(load(tmp_path, mesh=MeshConfig(data=2, tensor=2, zero=3)), HeadConfig(labels=2), seed=1)
    weight = reward.params["score"]["weight"]
    assert weight.sharding.shard_shape(weight.shape) == (12, 2)
    expected = with_head(load(tmp_path), HeadConfig(labels=2), seed=1)
    np.testing.assert_array_equal(weight, expected.params["score"]["weight"])
    np.testing.assert_allclose(reward.scores(TOKENS), expected.scores(TOKENS), atol=1e-5)


def test_refused(base):
    with pytest.raises(UserError, match="has to be a number"):
        with_head(base, HeadConfig())
    with pytest.raises(UserError, match="ends in 2 scores, not in 3"):
        with_head(with_head(base, HeadConfig(labels=2)), HeadConfig(labels=3))
    with pytest.raises(UserError, match="has no scores"):
        base.scores(TOKENS)
    for bad, message in (
        (HeadConfig(labels=0), "labels is 0"),
        (HeadConfig(pooling="mean"), "pooling=mean is of scores"),
        (HeadConfig(transform_bias=True), "for model.head.transform"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(CONFIG, head=bad).resolved()


@pytest.mark.parametrize("name", sorted(set(CLASSES) & set(FAMILIES)))
def test_every_class_of_transformers_is_known(name):
    known = list(family(name).heads({}))
    assert [theirs for theirs in CLASSES[name].values() if theirs not in (None, *known)] == []


def test_labels_of_a_config():
    """Two where nothing is said, as in transformers; what contradicts itself is refused."""
    llama = family("llama")
    fields = {"architectures": ["LlamaForSequenceClassification"], "hidden_size": 64, "num_attention_heads": 4}
    assert llama.from_hf(fields).head == HeadConfig(labels=2)
    assert llama.from_hf({**fields, "num_labels": 5}).head.labels == 5
    assert llama.from_hf({**fields, "id2label": {"0": "good"}}).head.labels == 1
    with pytest.raises(UserError, match="num_labels is 3, and id2label names 1"):
        llama.from_hf({**fields, "id2label": {"0": "good"}, "num_labels": 3})
    with pytest.raises(UserError, match="id2label"):
        llama.from_hf({**fields, "id2label": ["good"]})
