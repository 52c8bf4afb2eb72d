"""Hybrid families: layers in any order that they can say, and what is refused by name."""

from typing import Any

import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families import family
from llm_jax.models.mamba_config import MambaConfig
from tests.models.test_families import metas

SIZES: dict[str, Any] = {"vocab_size": 53, "hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "num_layers": 3}
JAMBA: dict[str, Any] = {"family": "jamba", "positions": "none", **SIZES}
MAMBA = MambaConfig(inner_size=48, state_size=4, dt_rank=2, selection_norm="weighted")
MAMBA2 = MambaConfig(inner_size=48, state_size=5, num_heads=6, num_groups=2, dt_min=0.1)
EXPERTS = ExpertsConfig(num=4, top_k=2, normalize=False)
GRANITE: dict[str, Any] = {"family": "granitemoehybrid", "query_scale": 0.4, **SIZES}
NEMOTRON: dict[str, Any] = {"family": "nemotron_h", "positions": "none", "gated": False, "activation": "relu2", **SIZES}

SAID: dict[str, dict[str, Any]] = {
    "jamba of attention": JAMBA,
    "jamba that ends in attention": {**JAMBA, "mixers": ("mamba", "mamba", "attention"), "mamba": MAMBA},
    "jamba of mamba, experts first": {**JAMBA, "mixers": ("mamba",) * 3, "mamba": MAMBA, "experts": EXPERTS}
    | {"feed_forwards": ("experts", "dense", "dense")},
    "bamba of attention": {"family": "bamba", "rope_dim": 2, **SIZES},
    "bamba that turns whole heads": {"family": "bamba", "mixers": ("mamba2",) * 3, "mamba": MAMBA2, **SIZES},
    "granite of attention": {**GRANITE, "positions": "none", "rope_theta": 500.0},
    "granite of attention that turns": {**GRANITE, "experts": ExpertsConfig(num=4, shared_size=7)},
    "nemotron of feed-forwards": {**NEMOTRON, "mixers": ("none",) * 3},
    "scans cut and started elsewise": {"family": "bamba", "rope_dim": 2, "mixers": ("mamba2",) * 3, **SIZES}
    | {"mamba": MambaConfig(inner_size=48, state_size=5, num_heads=6, chunk_size=16, dt_init_max=0.2)},
    "glm4 that turns whole heads": {"family": "glm4", "norm_at": "sandwich", "rope_interleaved": True, **SIZES},
}


@pytest.mark.parametrize("name", SAID)
def test_a_family_says_it(name):
    """There and back, and nothing of it lost."""
    config = ModelConfig(**SAID[name])
    family(config.family).check(config)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({**JAMBA, "num_layers": 4, "mixers": ("attention", "attention", "mamba", "mamba"), "mamba": MAMBA}, "mixers"),
        ({**NEMOTRON, "mixers": ("none",) * 3, "experts": EXPERTS}, "experts"),
        ({**NEMOTRON, "mixers": ("mamba2", "none", "none"), "mamba": MAMBA2}, "layer 0 is mamba2 and dense"),
        ({**NEMOTRON, "mixers": ("none",) * 3, "tie_embeddings": True}, "tie_embeddings"),
        ({"family": "llama", "positions": "none", **SIZES}, "positions"),
    ],
)
def test_what_a_family_can_not_say(fields, word):
    config = ModelConfig(**fields)
    with pytest.raises(UserError, match=word):
        family(config.family).check(config)


@pytest.mark.parametrize(
    ("case", "changes", "word"),
    [
        ("jamba/experts", {"attn_layer_offset": 3}, "attn_layer_offset=3"),
        ("jamba/experts", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms=False"),
        ("jamba/experts", {"sliding_window": 8}, "sliding_window=8"),
        ("jamba/experts", {"mamba_dt_rank": "many"}, "mamba_dt_rank"),
        ("bamba/plain", {"attn_layer_indices": [3]}, "attn_layer_indices has 3"),
        ("bamba/plain", {"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ("bamba/plain", {"attn_rotary_emb": 8}, "attn_rotary_emb=8"),
        ("bamba/plain", {"mamba_d_head": 4}, "mamba_d_head=4"),
        ("bamba/plain", {"time_step_limit": 3}, "time_step_limit=3"),
        ("granitemoehybrid/experts", {"layer_types": ["mamba", "rnn", "mamba"]}, "layer_types has 'rnn'"),
        ("granitemoehybrid/experts", {"layer_types": ["mamba"]}, "1 entries for .*num_layers=3"),
        ("granitemoehybrid/experts", {"normalization_function": "layernorm"}, "normalization_function"),
        ("granitemoehybrid/experts", {"logits_scaling": 0}, "logits_scaling"),
        ("nemotron_h/dense", {"hybrid_override_pattern": "MXM*-"}, "hybrid_override_pattern has 'X'"),
        ("nemotron_h/dense", {"num_hidden_layers": 6}, "num_hidden_layers=6"),
        ("nemotron_h/dense", {"layers_block_type": ["mlp"] * 5}, "say different things"),
        ("nemotron_h/dense", {"rms_norm_eps": 1e-3, "layer_norm_epsilon": 1e-5}, "another spelling"),
        ("nemotron_h/dense", {"use_moe_gate": True}, "use_moe_gate=True is not a field"),
    ],
)
def test_a_config_that_would_be_another_model_is_refused(case, changes, word):
    name, which = case.split("/")
    fields = {**metas(name)[which]["old"], **changes}
    with pytest.raises(UserError, match=word):
        family(name).from_hf(fields).resolved()
