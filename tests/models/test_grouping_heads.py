"""Mean-pooled key and value heads (arXiv:2305.13245, section 2.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.grouping_heads import group_heads
from llm_jax.models.init import init_params
from llm_jax.models.loading import Model, load
from llm_jax.models.saving import save

CONFIG = ModelConfig(
    vocab_size=31, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=4, attention_bias=True
)
TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), init_params(decoder, 0))
    return Model(decoder, params, CONFIG.resolved())


def test_pools_by_hand(model):
    ours, before = (flatten(m.params) for m in (group_heads(model, 2), model))
    for name in ("k/weight", "v/weight", "k/bias", "v/bias"):
        path = f"segments/0/0/attention/{name}"
        heads = np.split(np.asarray(before[path]), 4, axis=-1)
        want = np.concatenate([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2], axis=-1)
        np.testing.assert_allclose(ours[path], want, rtol=1e-6)
    assert group_heads(model, 2).config.num_kv_heads == 2


def test_heads_that_are_equal_lose_nothing(model, tmp_path):
    """Two groups of equal heads: the grouped model computes the same, saved and read again too."""
    flat = flatten(model.params)

    def doubled(path, leaf):
        if not path.endswith(tuple(f"attention/{n}/{kind}" for n in "kv" for kind in ("weight", "bias"))):
            return leaf
        heads = jnp.split(leaf, 4, axis=-1)
        return jnp.concatenate([heads[0], heads[0], heads[2], heads[2]], axis=-1)

    twin = Model(model.decoder, unflatten({p: doubled(p, x) for p, x in flat.items()}), model.config)
    fewer = group_heads(twin, 2)
    np.testing.assert_allclose(fewer(TOKENS), twin(TOKENS), atol=1e-6)
    save(fewer, tmp_path)
    np.testing.assert_array_equal(load(tmp_path)(TOKENS), fewer(TOKENS))


def test_refused(model):
    with pytest.raises(UserError, match="kv_heads=3 does not divide the model's 4"):
        group_heads(model, 3)
