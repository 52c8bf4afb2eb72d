"""Special tokens in config.json of models that began here: transformers makes no embedding that lacks its padding."""

import json

import pytest
from transformers import AutoConfig

from llm_jax.models.families import FAMILIES, family
from tests.oracles.family_recipe import CONFIGS

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
PUBLISHED = [name for name in FAMILIES if name in CONFIGS]


def test_all_published_families_are_here():
    assert set(FAMILIES) - set(PUBLISHED) == {"llm_jax"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_those_that_transformers_would_take_are_in_the_vocabulary(tmp_path, name):
    """Where they are in a large one, as published models have, nothing is said of them; what a folder says stays."""
    ours, fields = family(name), {k: v for k, v in next(iter(CONFIGS[name].values())).items() if k not in SPECIAL}

    def taken(written):
        (tmp_path / "config.json").write_text(json.dumps(written))
        read = AutoConfig.from_pretrained(tmp_path).to_dict()
        # GLM-4's end tokens, a list, are put in whatever the file says; only what is one number is checked there.
        return {k: v for k, v in read.items() if k.endswith("_token_id") and isinstance(v, int)}

    config = ours.from_hf(fields)
    assert all(token < fields["vocab_size"] for token in taken(ours.to_hf(config, {})).values())
    large = ours.to_hf(ours.from_hf({**fields, "vocab_size": 300_000}), {})
    assert not [k for k in large if k.endswith("_token_id")]
    assert {k: v for k, v in taken(large).items() if v >= 100} == ours.TOKENS
    assert ours.to_hf(config, {"pad_token_id": 7})["pad_token_id"] == 7
