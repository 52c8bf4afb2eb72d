"""Published models by shapes alone: as many parameters as transformers counts on torch's meta device, exactly."""

import json
import math
from pathlib import Path

import jax
import pytest

from llm_jax.base.trees import flatten
from llm_jax.models import Decoder, ModelConfig, abstract_params, declarations, family_for
from llm_jax.models.cache import init_caches
from llm_jax.models.families import FAMILIES

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "published_sizes.json").read_text())["models"]
HERE = [name for name, model in GOLDEN.items() if model["config"]["model_type"] in FAMILIES]


def config_of(name: str) -> ModelConfig:
    """As of a folder that transformers wrote: without layers for further tokens, which it does not have."""
    fields = GOLDEN[name]["config"]
    family = family_for(fields)
    return family.as_stored(family.from_hf(fields), ())


@pytest.mark.parametrize("name", HERE)
def test_parameters(name):
    model, decoder = GOLDEN[name], Decoder(config_of(name))
    declared, counts = flatten(declarations(decoder)), {True: 0, False: 0}
    for path, leaf in flatten(abstract_params(decoder)).items():
        counts[declared[path].learned] += math.prod(leaf.shape)
    # What no gradient moves is a buffer to transformers.
    assert (counts[True], counts[False]) == (model["parameters"], model["buffers"])


def test_a_cache_takes_what_the_formula_says():
    """Llama-13B at 2,048 tokens: 2 x 2 bytes x 40 layers x 5,120 numbers x 2,048 tokens, 1.7 GB; and arrays that exist,
    of a model a hundred times smaller."""
    big = ModelConfig(vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40)
    shapes = jax.eval_shape(lambda: init_caches(big, 1, 2048, "bfloat16"))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) == 1_677_721_600
    small = ModelConfig(vocab_size=64, hidden_size=512, intermediate_size=64, num_layers=4, num_heads=4)
    leaves = jax.tree.leaves(init_caches(small, 1, 2048, "bfloat16"))
    held = sum(leaf.addressable_data(0).unsafe_buffer_pointer() != 0 and leaf.nbytes for leaf in leaves)
    assert held == 2 * 2 * 4 * 512 * 2048 == 1_677_721_600 / 100
