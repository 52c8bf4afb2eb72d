"""Adapters on one model: off, together, by rows of a batch, under another grouping of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.adapters.adapters import Adapters
from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.loading import AdaptedModel, load, save
from llm_jax.adapters.sites import Adaptation
from llm_jax.adapters.start import init_adapter
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder, layout
from llm_jax.models.parameter import abstract_params, bind
from llm_jax.models.segments import regroup
from tests.adapters.conftest import drawn
from tests.oracles import adapters_recipe as recipe

TOKENS = np.random.RandomState(0).randint(0, 53, (5, 13))


def logits_of(adapters, params, tree):
    def run(params, tree):
        bound = bind(adapters.decoder, unflatten(adapters.expand(params, [tree])))
        return bound.logits(bound(jnp.asarray(TOKENS, jnp.int32))[0])

    return np.asarray(jax.jit(run)(params, tree))


@pytest.fixture(scope="module")
def three(llama):
    found = {name: drawn(name, llama, fields) for name, fields in recipe.MERGED.items()}
    # Of other ranks in other layers.
    found["two"] = drawn("two", llama, {**recipe.MERGED["two"], "rank_pattern": {r"layers\.1\..*q_proj": 2}})
    return AdaptedModel(llama, found)


def test_rows_choose(three):
    """A batch whose rows use three adapters and none: each as alone."""
    rows = ["one", None, "three", "two", "one"]
    mixed = np.asarray(three(TOKENS, adapters=rows))
    for i, name in enumerate(rows):
        alone = three.base if name is None else AdaptedModel(three.base, {name: three.adapters[name]})
        expected = np.asarray(alone(TOKENS[i : i + 1]))[0]
        assert np.abs(mixed[i] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(mixed[0] - np.asarray(three.base(TOKENS))[0]).max() > 0.1


def test_off_is_the_model(three):
    """A row without an adapter is the model's own, and so is one with an adapter that has learned nothing yet."""
    off = np.asarray(three(TOKENS, adapters=[None] * 5))
    np.testing.assert_allclose(off, three.base(TOKENS), atol=1e-5)
    fresh = Adaptation(three.base.decoder, LoraConfig(r=4))
    adapters = Adapters(three.base.decoder, [fresh])
    start = init_adapter(fresh, three.base.params, seed=1)
    np.testing.assert_allclose(logits_of(adapters, three.base.params, start), three.base(TOKENS), atol=1e-5)


def test_folders_of_several(three, llama_folder, tmp_path):
    save(three, tmp_path)
    again = load(llama_folder, adapters={name: tmp_path / name for name in recipe.MERGED})
    rows = ["three", "one", None, "two", "two"]
    np.testing.assert_array_equal(again(TOKENS, adapters=rows), three(TOKENS, adapters=rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["one"], "1 adapters are named for 5 rows"),
        (["four"] * 5, "there is no adapter 'four'; there are one, two, thr"),
    ],
)
def test_unknown_rows(three, rows, message):
    with pytest.raises(UserError, match=message):
        three(TOKENS, adapters=rows)


def test_what_rows_cannot_choose(llama):
    dora = drawn("dora", llama, {"target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(UserError, match="DoRA"):
        AdaptedModel(llama, {"dora": dora})(TOKENS, adapters=["dora"] * 5)
    with pytest.raises(UserError, match="can't be together with others"):
        AdaptedModel(llama, {"dora": dora, "again": dora})


def test_grouping_changes_nothing(llama):
    """Start values, and what a trained adapter gives, with a segment for each layer and with one for all."""
    config = LoraConfig(
        r=3,
        lora_alpha=5.0,
        rank_pattern={r"layers\.1\..*": 5},
        layers_to_transform=(0, 1),
        target_modules=("q_proj", "up_proj"),
    )
    scanned, apart = llama.decoder, Decoder(llama.config, segments="unrolled")
    made = []
    for decoder, params in (
        (scanned, llama.params),
        (apart, regroup(llama.params, layout(scanned), layout(apart), jnp.stack)),
    ):
        adaptation = Adaptation(decoder, config)
        tree = init_adapter(adaptation, params, seed=3)
        for path, leaf in flatten(tree).items():
            if path.endswith("/b"):
                leaf += np.linspace(-0.3, 0.3, leaf.shape[-1], dtype=np.float32)
        adapters = Adapters(decoder, [adaptation])
        made.append((tree, adaptation.num_parameters, logits_of(adapters, params, tree)))
    (one, count, logits), (other, again, logits_apart) = made
    assert count == again == 3 * (24 + 40) + 5 * (24 + 40) + 3 * (24 + 36) + 5 * (24 + 36)
    np.testing.assert_allclose(logits, logits_apart, rtol=1e-5, atol=1e-5)
    q = np.asarray(flatten(one)["segments/0/0/lora/self_attn.q_proj/a"])
    assert q.shape == (3, 24, 5) and not q[2].any() and not q[0, :, 3:].any()
    np.testing.assert_array_equal(q[1], flatten(other)["segments/1/0/lora/self_attn.q_proj/a"][0])
    np.testing.assert_array_equal(q[0, :, :3], flatten(other)["segments/0/0/lora/self_attn.q_proj/a"][0])


def test_padding_stays(llama):
    """What fills a stack up has no gradient, and no part in the result."""
    config = LoraConfig(r=2, rank_pattern={r"layers\.1\..*": 4}, layers_to_transform=(0, 1), target_modules=("v_proj",))
    adaptation = Adaptation(llama.decoder, config)
    adapters = Adapters(llama.decoder, [adaptation])
    tree = init_adapter(adaptation, llama.params, seed=0)
    site = "segments/0/0/lora/self_attn.v_proj"
    flatten(tree)[f"{site}/b"][:2] += 0.1
    flatten(tree)[f"{site}/b"][0, 2:] = 0

    def loss(tree):
        bound = bind(adapters.decoder, unflatten(adapters.expand(llama.params, [tree])))
        return jnp.square(bound(jnp.asarray(TOKENS, jnp.int32))[0]).sum()

    grads = flatten(jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, tree)))
    a, b = np.asarray(grads[f"{site}/a"]), np.asarray(grads[f"{site}/b"])
    assert a[0, :, :2].any() and b[0, :2].any() and a[1].all(0).any()
    assert not a[0, :, 2:].any() and not b[0, 2:].any() and not a[2].any() and not b[2].any()


def llama2_7b() -> Decoder:
    return Decoder(
        ModelConfig(
            family="llama", vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32,
            intermediate_size=11008, max_position_embeddings=4096, tie_embeddings=False,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "count"), [(("q_proj", "v_proj"), 4_194_304), ("all-linear", 19_988_480)], ids=["q_v", "all"]
)
def test_trainable_share(targets, count):
    """Of Llama 2 7B at r=8 as PEFT prints it: 4,194,304 || all params: 6,742,609,920; and of all linear layers."""
    decoder = llama2_7b()
    whole = sum(int(np.prod(leaf.shape)) for leaf in flatten(abstract_params(decoder)).values())
    trained = Adaptation(decoder, LoraConfig(r=8, target_modules=targets)).num_parameters
    assert (trained, whole) == (count, 6_738_415_616)
    assert trained / (trained + whole) < 0.01
