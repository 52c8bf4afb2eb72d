"""What is said of models of every kind, against model cards, papers and closed forms."""

import json
from pathlib import Path

import pytest

from llm_jax import describe as door
from llm_jax.jobs.describe import Setting, describe
from llm_jax.jobs.describe_text import text
from llm_jax.models import Decoder, Model, ModelConfig, family_for, init_params
from llm_jax.models.cache_bytes import cache_bytes, total_bytes
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.flops import training_flops_per_token
from llm_jax.models.pattern import feed_forwards, in_words, mixers
from llm_jax.models.saving import save_native
from llm_jax.models.summary import active_parameters
from llm_jax.training.config import TrainConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "published_sizes.json").read_text())["models"]


def config_of(name: str) -> ModelConfig:
    fields = GOLDEN[name]["config"]
    family = family_for(fields)
    return family.as_stored(family.from_hf(fields), ())


# Billions, as the model card or the paper rounds them; of gpt-oss without the embedding, as its card counts.
ACTIVE = {
    "mistralai/Mixtral-8x7B-v0.1": 12.9,
    "Qwen/Qwen3-30B-A3B": 3.35,
    "allenai/OLMoE-1B-7B-0924": 1.28,
    "deepseek-ai/DeepSeek-V2": 21.4,
    "deepseek-ai/DeepSeek-V3": 37.6,
    "openai/gpt-oss-20b": 3.61,
    "openai/gpt-oss-120b": 5.13,
    "meta-llama/Llama-4-Scout-17B-16E (text)": 17.2,
    "ai21labs/AI21-Jamba-1.5-Large": 94,
    "ibm-granite/granite-4.0-h-small": 8.8,
    "meta-llama/Llama-3.1-8B": 8.03,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    config = config_of(name)
    found = active_parameters(Decoder(config))
    if config.family == "gpt_oss":
        found -= config.hidden_size * (config.vocab_size or 0)
    assert found / 1e9 == pytest.approx(ACTIVE[name], rel=0.005)


def test_layers_for_further_tokens_are_not_active():
    """As published: 671B and 14B of those layers, copies of embedding and head (0.93B each) among them."""
    family = family_for(GOLDEN["deepseek-ai/DeepSeek-V3"]["config"])
    whole = family.from_hf(GOLDEN["deepseek-ai/DeepSeek-V3"]["config"])
    plain = config_of("deepseek-ai/DeepSeek-V3")
    described = [describe(Setting("it", config)) for config in (whole, plain)]
    counts = [each["parameters"] for each in described]
    assert counts[0]["active"] == counts[1]["active"]
    more, copies = counts[0]["total"] - counts[1]["total"], 2 * 129280 * 7168
    assert counts[0]["mtp"] == more and round((more + copies) / 1e9, 1) == 13.5
    assert described[0]["flops_per_token"]["forward"] == described[1]["flops_per_token"]["forward"]


# DeepSeek-AI 2025, arXiv:2505.09343: table 1 (bfloat16 cache), table 2 (4,096 tokens, causal attention).
@pytest.mark.parametrize(
    "name, cache, gflops, off",
    [
        ("deepseek-ai/DeepSeek-V3", 70_272, 250, 0.005),
        ("deepseek-ai/DeepSeek-V2", None, 155, 0.005),
        ("meta-llama/Llama-3.1-405B", 516_096, 2448, 0.011),
    ],
)
def test_cache_and_flops_of_the_paper(name, cache, gflops, off):
    config = config_of(name)
    assert training_flops_per_token(config, 4096, False) / 1e9 == pytest.approx(gflops, rel=off)
    if cache is not None:
        assert cache_bytes(config, "bfloat16").per_token == cache


def test_caches_of_every_kind():
    """Closed forms: 2 K H numbers a token and layer, as far as a window; Mamba's I (4 N + 2 (K - 1)) at any length."""
    gemma = cache_bytes(config_of("google/gemma-3-27b-pt (text)"), "bfloat16")
    each = 2 * 2 * 16 * 128
    assert (gemma.per_token, gemma.window, gemma.per_token_beyond, gemma.state) == (62 * each, 1024, 10 * each, 0)
    assert total_bytes(config_of("google/gemma-3-27b-pt (text)"), 3, 5000, "bfloat16") == 3 * each * (
        10 * 5000 + 52 * 1024
    )
    mamba = cache_bytes(config_of("state-spaces/mamba-2.8b-hf"), "bfloat16")
    assert (mamba.per_token, mamba.state) == (0, 64 * 5120 * (4 * 16 + 2 * 3))
    jamba = cache_bytes(config_of("ai21labs/AI21-Jamba-1.5-Large"), "bfloat16")
    assert (jamba.per_token, jamba.state) == (9 * 2 * 2 * 8 * 128, 63 * 16384 * (4 * 16 + 2 * 3))
    nemotron = cache_bytes(config_of("nvidia/Nemotron-H-8B-Base-8K"), "bfloat16")
    assert nemotron.state == 24 * (4 * 128 * 64 * 128 + 2 * 3 * (8192 + 2 * 8 * 128))
    assert cache_bytes(config_of("answerdotai/ModernBERT-base"), "bfloat16").per_token == 0


def test_what_layers_see():
    said = {
        "google/gemma-3-27b-pt (text)": "10 × (5 sliding 1024, 1 full), 2 sliding 1024",
        "HuggingFaceTB/SmolLM3-3B": "9 × (3 full, 1 full without positions)",
        "meta-llama/Llama-4-Scout-17B-16E (text)": "12 × (3 chunked 8192, 1 full without positions)",
        "ai21labs/AI21-Jamba-1.5-Large": "9 × (4 mamba, 1 full, 3 mamba)",
        "ibm-ai-platform/Bamba-9B-v1": "9 mamba2, 1 full, 8 mamba2, 1 full, 8 mamba2, 1 full, 4 mamba2",
        "nvidia/Nemotron-H-8B-Base-8K": "24 mamba2, 24 none, 4 full, in no regular order",
        "deepseek-ai/DeepSeek-V3": "61 latent full",
        "answerdotai/ModernBERT-base": "7 × (1 full, 2 sliding ±64), 1 full",
    }
    assert {name: mixers(config_of(name)) for name in said} == said
    assert feed_forwards(config_of("deepseek-ai/DeepSeek-V3")) == "3 dense 18432, 58 experts (8 of 256 and shared)"
    assert feed_forwards(config_of("ai21labs/AI21-Jamba-1.5-Large")) == "36 × (1 dense 24576, 1 experts (2 of 16))"
    assert [in_words(labels) for labels in ("a", "ab", "aab" * 2 + "a")] == ["1 a", "1 a, 1 b", "2 × (2 a, 1 b), 1 a"]


SLIDING = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8,
    window=5, sights=("sliding", "full", "sliding"), feed_forwards=("dense", "experts", "experts"),
    experts=ExpertsConfig(num=4, top_k=2, shared_size=8, intermediate_size=12), family="llm_jax",
)  # fmt: skip


def test_a_small_model_in_words_and_numbers():
    found = describe(Setting("it", SLIDING, TrainConfig(batch_size=2), window=20))
    attention = 3 * (2 * 16 * 16 + 2 * 16 * 8)
    matrices = attention + 3 * 16 * 24 + 2 * (16 * 4 + 3 * 16 * 8 + 2 * 3 * 16 * 12) + 16 * 64
    assert found["parameters"]["active"] == matrices + 16 * 64 + 7 * 16
    assert found["parameters"]["total"] == found["parameters"]["active"] + 2 * 2 * 3 * 16 * 12
    # The last of 20 tokens sees 5, 20 and 5 keys; 4 N H for each.
    assert found["flops_per_token"]["decoding_last"] == pytest.approx(2 * matrices + 4 * 16 * 30, rel=1e-12)
    cache = found["cache"]
    assert (cache["bytes_per_token"], cache["bytes_per_token_beyond"]) == (3 * 64, 64)
    assert cache["bytes"] == 2 * 64 * (20 + 5 + 5)
    lines = text(found).splitlines()
    assert lines[0].endswith(f"parameters, {found['parameters']['active']:,} of them for each token")
    assert lines[1:3] == [
        "  mixers         1 sliding 5, 1 full, 1 sliding 5",
        "  feed-forwards  1 dense 24, 2 experts (2 of 4 and shared)",
    ]
    assert any("per token past 5" in line and line.endswith(" 64 bytes") for line in lines)
    assert any("gate 4 × 16→12" in line for line in lines)


def test_a_native_folder_through_the_door(tmp_path, capsys):
    decoder = Decoder(SLIDING)
    save_native(Model(decoder, init_params(decoder, 0), decoder.config), tmp_path / "native")
    door.main([str(tmp_path / "native"), "--json", "--dtype=bfloat16", "--window=20", "--batch=2"])
    said = json.loads(capsys.readouterr().out)
    assert (said["family"], said["cache"]["bytes"], said["pattern"]["mixers"]) == (
        "llm_jax",
        64 * (20 + 5 + 5),
        "1 sliding 5, 1 full, 1 sliding 5",
    )
