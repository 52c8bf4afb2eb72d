"""What a model is said to take: published counts, closed forms, live shards, and the compiler's own figures."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.describe import changed, parse
from llm_jax.jobs.describe import Setting, describe, read_setting
from llm_jax.jobs.describe_text import text
from llm_jax.jobs.terms import sft_objective
from llm_jax.kernels.flash_attention import bounds
from llm_jax.models import Decoder, HeadConfig, ModelConfig, abstract_params, declarations, init_params, layout
from llm_jax.models.families import family
from llm_jax.models.summary import parameters_by_part, rows
from llm_jax.sharding import MeshConfig, make_plan, storage_shardings
from llm_jax.training import OptimizerConfig, TrainConfig, abstract_state, init_state, make_optimizer, make_train_step
from llm_jax.training.config import GroupConfig

CONFIGS = Path(__file__).parents[2] / "configs"
# Parameters by the safetensors index of each on the hub, and bytes of cache per token in bfloat16: 2 x 2 L K H.
PUBLISHED: dict[str, tuple[dict, int, int]] = {
    "meta-llama/Llama-2-7b-hf": (
        dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32),
        6_738_415_616,
        524_288,
    ),
    "meta-llama/Meta-Llama-3-8B": (
        dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8),
        8_030_261_248,
        131_072,
    ),
    "TinyLlama/TinyLlama-1.1B": (
        dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_layers=22, num_heads=32, num_kv_heads=4),
        1_100_048_384,
        22_528,
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            tie_embeddings=True,
        ),
        134_515_008,
        23_040,
    ),
}
SMALL = ModelConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=768, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32
)


def setting(mesh: MeshConfig | None = None, model: ModelConfig = SMALL, window: int = 256, **train) -> Setting:
    return Setting("it", model, TrainConfig(**train), mesh or MeshConfig(data=1), window)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name, tmp_path):
    """Of a folder with a config.json and nothing else."""
    fields, parameters, cache = PUBLISHED[name]
    model = ModelConfig(**fields).resolved()
    (tmp_path / "config.json").write_text(json.dumps(family("llama").to_hf(model, {})))
    read = read_setting(str(tmp_path), ())
    described = describe(dataclasses.replace(read, train=TrainConfig(compute_dtype="bfloat16")))
    counts = described["parameters"]
    assert counts["total"] == parameters
    assert sum(counts[part] for part in ("embed", "attention", "mlp", "norms", "head")) == parameters
    assert sum(row["each"] * row["layers"] for row in described["layers"]) == parameters
    assert described["cache"]["bytes_per_token"] == cache
    assert described["cache"]["bytes"] == cache * 8 * 2048
    # Kaplan et al. 2020, arXiv:2001.08361, section 2.1: 6 per parameter and token, and the attention's 6 L T D.
    D, L, T = model.hidden_size, model.num_layers, 2048
    matrices = parameters - counts["norms"] - (0 if model.tie_embeddings else counts["embed"])
    assert described["flops_per_token"]["training"] == pytest.approx(6 * matrices + 6 * L * D * (T + 1), rel=1e-12)
    # A generated token attends to every key of the cache: 4 L D each.
    assert described["flops_per_token"]["decoding_last"] == pytest.approx(2 * matrices + 4 * L * D * T, rel=1e-12)
    assert described["memory"]["all_parameters_float32"] == 4 * parameters


def test_rows_and_parts_are_of_this_model():
    biased = dataclasses.replace(SMALL, attention_bias=True, tie_embeddings=True)
    decoder = Decoder(biased)
    where = [(row.where, row.layers) for row in rows(decoder)]
    assert where == [("embed", 1), ("layers 0–7", 8), ("norm", 1), ("head", 1)]
    assert "q.bias 256, q 256→256" in " ".join(rows(decoder)[1].what)
    counts = parameters_by_part(decoder)
    assert counts["attention"] == 8 * (2 * 256 * 256 + 2 * 256 * 128 + 256 + 128 + 128 + 256)
    assert counts["head"] == 0
    shapes = flatten(abstract_params(decoder))
    assert sum(counts.values()) == sum(math.prod(leaf.shape) for leaf in shapes.values())
    said = text(describe(setting(model=biased)))
    assert "the embedding, transposed (tied)" in said and "tied to embed" in said


def test_a_model_that_ends_in_scores():
    """A reward model of Llama-3-8B: the vocabulary's matrix gives way to one column, and no logits are made."""
    model = ModelConfig(**PUBLISHED["meta-llama/Meta-Llama-3-8B"][0])
    base = describe(setting(model=model))
    described = describe(setting(model=dataclasses.replace(model, head=HeadConfig(labels=1))))
    counts = described["parameters"]
    assert counts["total"] == 8_030_261_248 - 128256 * 4096 + 4096 and counts["score"] == 4096
    assert "head" not in counts and [row["where"] for row in described["layers"]][-1] == "score"
    fewer = base["flops_per_token"]["forward"] - described["flops_per_token"]["forward"]
    assert fewer == 2 * (128256 - 1) * 4096
    held = described["memory"]["per_device"]
    assert held["logits"] == 0 and held["activations"] > 0
    assert "score" in text(described)


def test_an_encoder():
    """ModernBERT-base: the hub's count, attention to both sides, no cache."""
    model = family("modernbert").from_hf({"model_type": "modernbert"})
    described = describe(setting(model=model, window=1024))
    assert described["parameters"]["total"] == 149_655_232
    assert described["cache"]["bytes"] == 0 and described["flops_per_token"]["decoding_first"] is None
    # 8 of 22 layers see all 1024 tokens, the others 64 on either side, fewer near the ends of the text.
    sliding = sum(min(i, 64) + min(1023 - i, 64) + 1 for i in range(1024)) / 1024
    matrices = 149_655_232 - described["parameters"]["norms"] - 50368 - 768
    keys = 8 * 1024 + 14 * sliding
    assert described["flops_per_token"]["forward"] == pytest.approx(2 * matrices + 4 * 768 * keys, rel=1e-9)
    assert "cache: none" in text(described)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "data, tensor, rule, ema", [(8, 1, "adamw", None), (4, 2, "adafactor", 0.99), (2, 4, "muon", None)]
)
def test_persistent_bytes_are_those_of_live_shards(data, tensor, rule, ema, zero):
    model = dataclasses.replace(SMALL, num_layers=2, vocab_size=64)
    mesh = MeshConfig(data, tensor, zero)
    plan, decoder = make_plan(mesh), Decoder(model)
    declared = {"policy": declarations(decoder)}
    optimizer = make_optimizer(OptimizerConfig(rule=rule), declared, 10, layouts={"policy": layout(decoder)})
    shardings = storage_shardings(declared["policy"], abstract_params(decoder), plan)
    params = {"policy": init_params(decoder, 0, shardings)}
    state = init_state(params, optimizer, declared, plan, ema=ema is not None)
    held = dict.fromkeys(plan.mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    as_said = setting(mesh, model, window=16, optimizer=OptimizerConfig(rule=rule), ema_decay=ema)
    said = describe(as_said)["memory"]["per_device"]
    assert {said["persistent"]} == set(held.values())
    assert said["ema"] == (0 if ema is None else said["params"])


@pytest.mark.parametrize(
    "mesh, remat, microbatches",
    [
        (MeshConfig(1), "none", 1),
        (MeshConfig(1), "full", 1),
        (MeshConfig(8, 1, 1), "none", 1),
        (MeshConfig(8, 1, 3), "full", 2),
        (MeshConfig(4, 2, 2), "dots", 1),
    ],
)
def test_a_step_takes_what_is_said_within_a_fifth(mesh, remat, microbatches):
    """XLA's own figure for the compiled step's temporaries on CPU devices, in float32."""
    said = describe(
        setting(mesh, remat=remat, microbatches=microbatches, batch_size=16 if mesh.data > 1 else 8), platform="cpu"
    )["memory"]
    plan, decoder = make_plan(mesh), Decoder(SMALL, remat=remat)
    declared = {"policy": declarations(decoder)}
    optimizer = make_optimizer(OptimizerConfig(), declared, 10)
    state = abstract_state({"policy": abstract_params(decoder)}, optimizer, declared, plan)
    shape = (microbatches, said["batch_size"] // microbatches, said["window"])
    sharding = plan.activation_sharding((None, "batch", "length"))
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.uint8 if name == "loss_mask" else jnp.int32, sharding=sharding)
        for name in ("tokens", "segment_ids", "positions", "loss_mask")
    }
    step = make_train_step(sft_objective(decoder), optimizer, plan, declared)
    compiled = step.lower(state, batch).compile().memory_analysis()
    per_device = said["per_device"]
    assert per_device["total"] - per_device["persistent"] == pytest.approx(compiled.temp_size_in_bytes, rel=0.2)
    assert per_device["persistent"] == pytest.approx(compiled.argument_size_in_bytes, rel=0.002)


@pytest.mark.parametrize(
    "platform, dtype, logits, scores",
    [
        # On a CPU a chunk is of 4 MiB, or 512 tokens; two tiles of 128 x 256 for each of 8 heads, 4 rows at a time.
        ("cpu", "bfloat16", 3 * 4 * 512 * 2048, 2 * 3 * 4 * 8 * 4 * 128 * 256),
        ("tpu", "bfloat16", 0, 0),
        ("tpu", "float32", 0, 0),
        # Gradients of all 2,048 tokens' logits, in 16 bits.
        ("gpu", "bfloat16", 2 * 2048 * 2048, 0),
        # Hopper's tensor cores take no float32, so XLA's form runs: all tokens, and blocks of 256, the whole window.
        ("gpu", "float32", 3 * 4 * 2048 * 2048, 3 * 4 * 8 * 8 * 256 * 256),
    ],
)
def test_what_kernels_hold_is_counted_by_platform(monkeypatch, platform, dtype, logits, scores):
    """Of 8 rows of 256 tokens; a device of a CPU has two cores."""
    monkeypatch.setattr(bounds, "cores_per_device", lambda: 2)
    held = describe(setting(compute_dtype=dtype), platform=platform)["memory"]["per_device"]
    assert held["logits"] == logits
    # Without remat nothing of a layer is made again.
    assert held["working"] == scores


def test_frozen_models_and_groups():
    plain = describe(setting())["memory"]["per_device"]
    with_ref = describe(dataclasses.replace(setting(), frozen={"ref": SMALL}))["memory"]["per_device"]
    assert with_ref["frozen"] == plain["params"] and plain["frozen"] == 0
    half = setting(optimizer=OptimizerConfig(groups=(GroupConfig(match="mlp/", learning_rate_multiplier=0.0),)))
    fewer = describe(half)
    assert fewer["memory"]["per_device"]["gradients"] == plain["gradients"] - 4 * fewer["parameters"]["mlp"]


def test_a_config_brings_its_own_setting():
    read = read_setting(f"{CONFIGS / 'pretrain.py'}:llama_8b", ())
    assert (read.train.compute_dtype, read.mesh.zero, read.model.num_kv_heads) == ("bfloat16", 3, 8)
    chained = read_setting(f"{CONFIGS / 'dpo.py'}:test", [("reference_logps", "live"), ("train.remat", "full")])
    assert chained.model == read_setting(f"{CONFIGS / 'pretrain.py'}:test", ()).model
    assert chained.train.remat == "full" and chained.frozen == {"ref": chained.model}
    with pytest.raises(UserError, match="sft.py:llama_8b needs --config.init_from="):
        read_setting(f"{CONFIGS / 'sft.py'}:llama_8b", ())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "describe takes one model or config; it got 0, see --help"),
        (["a", "b"], "describe takes one model or config; it got 2, see --help"),
        (["a", "--windw=3"], "unknown argument --windw=3; the nearest is --window"),
        (["a", "--mesh"], "--mesh needs a value: --mesh=..."),
        (["a", "--platform=tpv"], "--platform=tpv is not one of cpu, gpu, tpu"),
        (["a", "--mesh=8"], "--mesh=8 is not data=N,tensor=N,zero=N"),
        (["a", "--mesh=date=8"], "--mesh: date=8: no such field; the nearest is config.data"),
        (["a", "--dtype=float16"], "--dtype: compute_dtype=float16: expected 'float32' | 'bfloat16'"),
        (["a", "--window=0"], "--window=0 has to be a positive number of tokens"),
        (["a", "--mesh=tensor=3"], "mesh.tensor=3 does not divide heads=8"),
        (["a", "--mesh=data=3"], "batch 8 is not divided by microbatches 1 x data 3"),
        (["a", "--mesh=zero=4"], "mesh.zero is 4; ZeRO stages are 0, 1, 2, 3"),
        (["a", "--batch=0"], "batch_size is 0; it must be at least 1"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(UserError) as error:
        _, options, _, _ = parse(arguments)
        describe(changed(setting(), options))
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            {"train.balancing.load_balance": "0.01"},
            "train.balancing.load_balance is 0.01, but the model has no experts",
        ),
        ({"train.mtp_weight": "0.3"}, "train.mtp_weight is 0.3, but the model predicts no further tokens"),
        ({"model.family": "llm_jax", "model.mtp": "1"}, "model.mtp=1 is not trained without train.mtp_weight"),
        ({"model.experts.num": "8"}, "model.experts="),
    ],
)
def test_configs_that_would_not_run_are_refused(overrides, said):
    with pytest.raises(UserError) as error:
        read_setting(f"{CONFIGS / 'pretrain.py'}:test", list(overrides.items()))
    assert str(error.value).startswith(said)


def test_overrides_need_a_config(tmp_path):
    with pytest.raises(UserError, match="--config.train.steps is for a config file"):
        read_setting(str(tmp_path), [("train.steps", "3")])
    with pytest.raises(UserError, match="is not a folder"):
        read_setting("nowhere", ())


def test_the_door():
    command = [sys.executable, "-m", "llm_jax.describe", "configs/sft.py", "--mesh=data=4,zero=2", "--batch", "8"]
    done = subprocess.run([*command, "--json"], cwd=CONFIGS.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["parameters"]["total"] == 1_049_728
    assert (said["memory"]["data"], said["memory"]["zero"], said["memory"]["batch_size"]) == (4, 2, 8)


def test_layers_that_take_turns_are_named_once():
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, feed_forwards=("dense", "none", "dense", "none")
    )
    named = [row.where for row in rows(Decoder(config)) if row.where.startswith("layer")]
    assert named == ["layers 0, 2", "layers 1, 3"]
