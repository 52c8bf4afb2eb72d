"""DeepSeek, gpt-oss and Llama 4: what their configs say beyond the golden ones, and what is refused by name."""

from typing import Any

import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig, RopeScaling
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families import family
from llm_jax.models.latent_config import LatentConfig
from tests.models.test_families import metas

SIZES: dict[str, Any] = {"vocab_size": 53, "hidden_size": 24, "num_heads": 4, "num_layers": 3}
LATENT: dict[str, Any] = {
    "latent": LatentConfig(kv_rank=10, nope_dim=4, rope_dim=6, value_dim=5),
    "head_dim": 6,
    "experts": ExpertsConfig(num=4, top_k=2, intermediate_size=10, shared_size=20, normalize=False),
    **SIZES,
}
V2: dict[str, Any] = {"family": "deepseek_v2", "rope_interleaved": True, **LATENT}
SIGMOID: dict[str, Any] = {"scores": "sigmoid", "correction_bias": True, "group_score": "top2"}
V3: dict[str, Any] = {
    **V2,
    "family": "deepseek_v3",
    "experts": ExpertsConfig(num=6, top_k=2, intermediate_size=10, shared_size=10, groups=2, **SIGMOID),
}
GPT_OSS: dict[str, Any] = {
    "family": "gpt_oss",
    "sinks": True,
    "window": 5,
    "experts": ExpertsConfig(num=4, top_k=2, bias=True, router_bias=True, limit=3.0),
    **SIZES,
}
WEIGHED: dict[str, Any] = {"scores": "sigmoid", "normalize": False, "weigh": "input"}
LLAMA4: dict[str, Any] = {
    "family": "llama4_text",
    "rope_interleaved": True,
    "chunk": 8,
    "experts": ExpertsConfig(num=4, top_k=1, intermediate_size=10, shared_size=10, **WEIGHED),
    **SIZES,
}

SAID: dict[str, dict[str, Any]] = {
    "deepseek_v2 of experts alone": V2,
    "deepseek_v2 with dense layers": {**V2, "feed_forwards": ("dense", "dense", "experts")},
    "deepseek_v3": V3,
    "deepseek_v3 that turns halves": {**V3, "rope_interleaved": False},
    "gpt_oss without scaling": GPT_OSS,
    "gpt_oss of full layers": {**GPT_OSS, "sights": ("full",) * 3},
    "llama4 whose queries don't grow": LLAMA4,
    "llama4 whose queries grow": {**LLAMA4, "query_growth": 0.2, "query_growth_every": 16, "qk_norm": "plain"},
    "llama4 that sees all": {**LLAMA4, "sights": ("full",) * 3, "rope_layers": (True, False, True)},
    # As Llama 4 Scout has it: waves are stretched or kept, none are between.
    "llama4 with a sharp edge": {
        **LLAMA4,
        "rope_scaling": RopeScaling("llama3", 16.0, original_length=16, low_freq_factor=1.0, high_freq_factor=1.0),
    },
}


@pytest.mark.parametrize("name", SAID)
def test_a_family_says_it(name):
    """There and back, and nothing of it lost."""
    config = ModelConfig(**SAID[name])
    family(config.family).check(config)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({**V2, "feed_forwards": ("experts", "dense", "experts")}, "model.feed_forwards="),
        ({**V2, "rope_interleaved": False}, "model.rope_interleaved=False"),
        ({**V2, "experts": ExpertsConfig(num=4, intermediate_size=10, normalize=False)}, "n_shared_experts=0"),
        ({**V2, "experts": ExpertsConfig(num=4, intermediate_size=10, shared_size=15, normalize=False)}, "shared_size"),
        ({**V2, "experts": ExpertsConfig()}, "n_shared_experts=0"),
        ({**V3, "experts": LATENT["experts"]}, "experts"),
        ({**V3, "attention_bias": True, "output_bias": False}, "model.output_bias=False"),
        ({**GPT_OSS, "sinks": False}, "model.sinks=False"),
        ({**GPT_OSS, "experts": ExpertsConfig(num=4, bias=True, router_bias=True)}, "swiglu_limit"),
        ({**LLAMA4, "qk_norm": "head"}, "model.qk_norm='head'"),
        ({**LLAMA4, "experts": ExpertsConfig(num=4, intermediate_size=10, **WEIGHED)}, "shared_size"),
        ({"family": "llama", "qk_norm": "plain", **SIZES}, "model.qk_norm='plain'"),
        ({"family": "smollm3", "query_growth": 0.1, **SIZES}, "model.query_growth=0.1"),
    ],
)
def test_what_a_family_can_not_say(fields, word):
    config = ModelConfig(**fields)
    with pytest.raises(UserError, match=word):
        family(config.family).check(config)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"qk_norm": "plain", "positions": "alibi"}, "model.qk_norm=plain is for model.positions=rope"),
        ({"query_growth_every": 16}, "query_growth_every says nothing"),
        ({"query_growth": 0.1, "query_growth_every": 0}, "query_growth_every is 0"),
        ({"query_growth": -0.1}, "query_growth is -0.1"),
        ({**LATENT, "query_growth": 0.1}, "query_growth=0.1: latent attention"),
    ],
)
def test_what_no_decoder_has(fields, word):
    with pytest.raises(UserError, match=word):
        ModelConfig(**{"family": "llm_jax", **SIZES, **fields}).resolved()


@pytest.mark.parametrize(
    ("case", "changes", "word"),
    [
        ("deepseek_v2/lite", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("deepseek_v2/lite", {"topk_method": "group_limited_greedy"}, "n_group"),
        ("deepseek_v2/lite", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        ("deepseek_v2/lite", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported"),
        ("deepseek_v2/lite", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ("deepseek_v2/lite", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("deepseek_v2/lite", {"num_key_value_heads": 2}, "num_key_value_heads=2 is not num_attention_heads=4"),
        ("deepseek_v2/lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("deepseek_v2/lite", {"first_k_dense_replace": 3}, "dense,dense,dense"),
        ("deepseek_v2/lite", {"sliding_window": 8}, "sliding_window=8 is not a field"),
        ("deepseek_v3/groups", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ("deepseek_v3/groups", {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ("deepseek_v3/groups", {"n_group": 4}, "groups=4 does not divide"),
        ("deepseek_v3/groups", {"n_group": 6, "topk_group": 3}, "groups of at least 2"),
        ("deepseek_v3/groups", {"mlp_bias": True}, "mlp_bias=True is not a field"),
        ("deepseek_v3/groups", {"n_shared_experts": 10**30}, "shared_size"),
        ("gpt_oss/yarn", {"swiglu_limit": None}, "swiglu_limit"),
        ("gpt_oss/yarn", {"experts_per_token": 3}, "experts_per_token=3, but another spelling"),
        ("gpt_oss/yarn", {"layer_types": ["sliding_attention"]}, "1 entries for model.num_layers=3"),
        ("gpt_oss/yarn", {"num_hidden_layers": 10**30}, "num_hidden_layers=1000000.* is not between"),
        ("llama4_text/chunks", {"no_rope_layers": [1, 0]}, "rope_layers has 2 entries"),
        ("llama4_text/chunks", {"attention_chunk_size": None}, "layer 0 is chunked, and model.chunk is None"),
        ("llama4_text/chunks", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step=0"),
        ("llama4_text/chunks", {"attn_temperature_tuning": 4}, "attn_temperature_tuning"),
        ("llama4_text/chunks", {"floor_scale": 0}, "query_growth_every is 0"),
        ("llama4_text/chunks", {"vision_config": {"hidden_size": 4}}, "vision_config"),
    ],
)
def test_configs_that_are_refused(case, changes, word):
    name, _, kind = case.partition("/")
    hf = {**metas(name)[kind]["new"], **changes}
    with pytest.raises(UserError, match=word) as error:
        family(name).from_hf(hf)
    assert "\n" not in str(error.value)


def test_gpt_oss_scales_unless_told_otherwise():
    """As transformers: where config.json says nothing of rotation it is the published model's YaRN."""
    hf = {key: value for key, value in metas("gpt_oss")["tied"]["new"].items() if not key.startswith("rope")}
    for silent in ({}, {"rope_scaling": None}, {"rope_parameters": None}):
        config = family("gpt_oss").from_hf({**hf, **silent})
        assert config.rope_scaling == RopeScaling("yarn", 32.0, original_length=4096, truncate=False, beta_fast=32.0)
        assert config.rope_theta == 150000.0
    assert family("gpt_oss").from_hf({**hf, "rope_scaling": {"rope_type": "default"}}).rope_scaling is None
