"""Folder in -> folder out, every field of config.json honoured or refused, native folders, meshes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.inference import Generator
from llm_jax.models.config import ModelConfig, RopeScaling
from llm_jax.models.decoder import Decoder, layout
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.families import family
from llm_jax.models.flops import flops_per_token
from llm_jax.models.init import init_params
from llm_jax.models.loading import Model, load, read_extra, read_model_config
from llm_jax.models.saving import save, save_native
from llm_jax.models.segments import regroup
from llm_jax.sharding.config import MeshConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.safetensors import write_folder
from llm_jax.storage.workdir import Workdir

BF16 = ml_dtypes.bfloat16

llama = family("llama")


def bits(folder):
    """All tensors of a folder as (dtype, bytes)."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: (x.dtype.name, x.tobytes()) for name, x in tensors.items()}


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("name", ["tied", "biases"])
def test_folder_in_folder_out(hf_folder, tmp_path, name, dtype):
    folder = hf_folder(name, dtype)
    save(load(folder), tmp_path / "out")
    assert bits(tmp_path / "out") == bits(folder)
    ours, theirs = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "out", folder))
    assert ours == theirs | {"_name_or_path": ours["_name_or_path"]}


def test_mixed_dtypes_shards_and_tokenizer_files(hf_folder, recipe, tmp_path, capfd):
    folder = hf_folder("gqa", None, bos_token_id=7, custom_note=None)
    tensors = {k: v.astype(BF16) if "proj" in k else v for k, v in recipe.weights("gqa").items()}
    write_folder(folder, tensors, max_shard_bytes=10_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / file).write_text(f'{{"from": "{file}"}}')
    model = load(folder)
    assert "config.json: no fields of the llama family, empty, and not kept: custom_note\n" in capfd.readouterr().err
    assert model.tokenizer_dir == folder
    save(model, tmp_path)
    assert bits(tmp_path) == bits(folder)
    assert (tmp_path / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    assert {file.name for file in tmp_path.glob("*tok*")} == {"tokenizer.json", "tokenizer_config.json"}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["bos_token_id"] == 7
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 10000.0
    save(model, tmp_path, dtype="bfloat16")
    assert {dtype for dtype, _ in bits(tmp_path).values()} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_config_of_older_transformers(recipe):
    fields = recipe.config("long_rope")
    new = {**fields, "rope_parameters": {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}}
    old = {**fields, "rope_theta": 5e5, "torch_dtype": "bfloat16", "rope_scaling": None, "pretraining_tp": 1}
    assert llama.from_hf(new) == llama.from_hf(old)
    assert llama.from_hf(new).rope_theta == 5e5
    assert llama.from_hf({"model_type": "llama"}).norm_eps == 1e-6  # what transformers takes where nothing is said


def test_every_field_matters_or_is_refused(recipe):
    """The config that comes back from `to_hf` is the one that went in, for each golden Llama."""
    for name in recipe.CONFIGS:
        config = llama.from_hf(recipe.config(name))
        assert llama.from_hf(llama.to_hf(config, {})).resolved() == config.resolved()
        fields = llama.to_hf(config, llama.carried(recipe.config(name)))
        assert {key: fields[key] for key in recipe.config(name)} == recipe.config(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"type": "mrope", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}),
        ("hidden_act", "tanh"),
        ("pretraining_tp", 2),
        ("attention_dropout", 0.1),
        ("architectures", ["LlamaForQuestionAnswering"]),
        ("sliding_window", 128),
        ("quantization_config", {"quant_method": "gptq"}),
        ("no_such_field", 3),
    ],
)
def test_fields_that_are_not_honoured(hf_folder, field, value):
    with pytest.raises(UserError) as error:
        load(hf_folder("gqa", None, **{field: value}))
    assert field in str(error.value) and repr(value) in str(error.value)


def test_bad_folders(hf_folder, recipe, tmp_path):
    folder = hf_folder("gqa")
    tensors = recipe.weights("gqa")

    def message(change: dict, drop: str | None = None) -> str:
        kept = {k: v for k, v in {**tensors, **change}.items() if k != drop}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(UserError) as error:
            load(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no tensor model.norm.weight" in message({}, "model.norm.weight")
    assert "model.extra" in message({"model.extra": np.zeros(3, np.float32)})
    short = {"model.norm.weight": np.zeros(3, np.float32)}
    assert "model.norm.weight has shape [3], config.json says [24]" in message(short)
    assert "model.norm.weight has dtype int32" in message({"model.norm.weight": np.zeros(24, np.int32)})
    for path, text in ((tmp_path / "absent", "is not a folder"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=text):
            load(path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt3"}')
    with pytest.raises(UserError, match="'gpt3' is not a known family .*nearest: gpt2"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin"):
        load(tmp_path)


def test_tied_folder_with_a_head(hf_folder, recipe):
    folder = hf_folder("tied")
    tensors = recipe.weights("tied")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, folder / "model.safetensors")
    load(folder)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load(folder)


def test_native_folder_round_trip(hf_folder, tmp_path):
    """Hugging Face -> native -> Hugging Face, by the door, bit for bit; both load to the same logits."""
    folder = hf_folder("biases", BF16, eos_token_id=5)
    (folder / "tokenizer.json").write_text("{}")
    for source, target in ((folder, tmp_path / "native"), (tmp_path / "native", tmp_path / "back")):
        command = [sys.executable, "-m", "llm_jax.convert", str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert bits(tmp_path / "back") == bits(folder)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 5
    assert (tmp_path / "back" / "tokenizer.json").exists()
    tokens = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(load(tmp_path / "native")(tokens), load(folder)(tokens))
    assert read_model_config(tmp_path / "native") == read_model_config(tmp_path / "back").resolved()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, zero=3)])
def test_native_folders_are_cast_as_they_are_read(hf_folder, tmp_path, dtype, mesh):
    """To the numbers in float32, rounded to the nearest."""
    save_native(load(hf_folder("biases")), tmp_path)
    cast, whole = (flatten(load(tmp_path, kind, mesh).params) for kind in (dtype, "float32"))
    for name, leaf in whole.items():
        assert cast[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(cast[name]), np.asarray(leaf).astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("mesh", [None, MeshConfig(8, 1, 3)])
def test_what_chooses_experts_stays_float32(tmp_path, mesh):
    """As transformers keeps `e_score_correction_bias`: a rounded one picks other experts."""
    experts = ExpertsConfig(num=8, top_k=2, scores="sigmoid", correction_bias=True)
    config = ModelConfig(
        family="llm_jax", vocab_size=64, hidden_size=32, intermediate_size=16, num_layers=2, experts=experts
    )
    decoder = Decoder(config)
    params = flatten(init_params(decoder, 0))
    (path,) = [path for path in params if path.endswith("correction")]
    params[path] = jax.random.normal(jax.random.key(0), params[path].shape)
    model = Model(decoder, unflatten(params), decoder.config)
    save(model, tmp_path / "hf")
    save_native(model, tmp_path / "native")
    for folder in ("hf", "native"):
        for name, leaf in flatten(load(tmp_path / folder, "bfloat16", mesh).params).items():
            assert leaf.dtype == (jnp.float32 if "router" in name else jnp.bfloat16), name
            if leaf.dtype == jnp.float32:
                np.testing.assert_array_equal(np.asarray(leaf), np.asarray(params[name]))
    decoding = flatten(Generator(load(tmp_path / "hf"), dtype="bfloat16").params)
    assert {str(leaf.dtype) for name, leaf in decoding.items() if "router" in name} == {"float32"}
    assert decoding["embed/weight"].dtype == jnp.bfloat16


def test_convert_refuses(hf_folder, tmp_path):
    def run(*args):
        done = subprocess.run(
            [sys.executable, "-m", "llm_jax.convert", *map(str, args)], capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "file").write_text("")
    assert run(tmp_path / "absent", tmp_path / "out") == (2, f"error: {tmp_path}/absent is not a folder\n")
    assert run(hf_folder("gqa"), tmp_path) == (2, f"error: {tmp_path} is not empty\n")
    assert run("one")[0] == 2
    status, text = run("--help")
    assert status == 0 and "SRC DST" in text


def test_help_is_answered_without_jax():
    code = "import sys, llm_jax.convert as c; c.main(['--help']); assert not {'jax', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_workdir_of_another_grouping(hf_folder, tmp_path):
    """A checkpoint written under another layout loads to the same model."""
    model = load(hf_folder("large_eps"))
    save_native(model, tmp_path)
    expected = model(np.arange(8)[None])
    other = Decoder(model.config, segments=[1, 3])
    params = regroup(jax.tree.map(np.asarray, model.params), layout(model.decoder), layout(other))
    checkpoints = Checkpoints(Workdir(tmp_path).checkpoints)
    checkpoints.save(1, {"params": {"policy": jax.tree.map(jnp.asarray, params)}}, {"layout": layout(other)})
    checkpoints.wait()
    np.testing.assert_array_equal(load(tmp_path)(np.arange(8)[None]), expected)


@pytest.mark.parametrize("mesh", [MeshConfig(data=4, tensor=2), MeshConfig(data=2, tensor=2, zero=3)])
def test_on_a_mesh(tmp_path, mesh):
    config = ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, init_std=0.2
    )
    decoder = Decoder(config)
    save(Model(decoder, init_params(decoder, 0), config), tmp_path)
    tokens = np.arange(96).reshape(8, 12) % 64
    segments = np.array([[1] * 7 + [2] * 5] * 8)
    one, many = load(tmp_path), load(tmp_path, mesh=mesh)
    expected = one(tokens, None, segments)
    logits = many(tokens, None, segments)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    low = load(tmp_path, "bfloat16")
    assert low.params["norm"]["weight"].dtype == jnp.bfloat16
    np.testing.assert_allclose(low(tokens, None, segments), expected, atol=0.05 * np.abs(expected).max())
    with pytest.raises(UserError, match="mesh.data=. does not divide batch=3"):
        many(tokens[:3])
    with pytest.raises(UserError, match="mesh.tensor=4 does not divide kv_heads=2"):
        load(tmp_path, mesh=MeshConfig(data=2, tensor=4))
    save(many, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(tmp_path)


def test_flops():
    """Against 2 per weight of the matrices, and attention counted query by query."""
    config = ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2)
    matrices = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32) + 16 * 64
    attention = sum(2 * 2 * 4 * 4 * (query + 1) for query in range(10)) * 2 / 10
    assert flops_per_token(config, 10) == 2 * matrices + attention


def test_a_job_that_starts_from_a_converted_folder_keeps_the_extra_fields(hf_folder, tmp_path):
    folder = hf_folder("gqa", eos_token_id=7)
    save_native(load(folder), tmp_path / "native")
    assert load(tmp_path / "native").extra["eos_token_id"] == 7
    assert read_extra(tmp_path / "native")["eos_token_id"] == 7


def test_two_spellings_of_a_field_have_to_agree():
    neox = family("gpt_neox")
    assert neox.from_hf({"rotary_pct": 0.5, "partial_rotary_factor": 0.5}).rope_dim == 48
    with pytest.raises(UserError, match="partial_rotary_factor=0.25, but another spelling of it says 0.5"):
        neox.from_hf({"rotary_pct": 0.5, "partial_rotary_factor": 0.25})


@pytest.mark.parametrize("name, local", [("gemma3_text", "rope_local_base_freq"), ("modernbert", "local_rope_theta")])
def test_rope_parameters_by_kind_of_layer(name, local):
    """Of families whose sliding layers have a base of their own: nothing that is said there goes unread."""
    full, sliding = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}, {"rope_type": "default"}
    by_kind = {"full_attention": full, "sliding_attention": sliding}
    read = family(name).from_hf({"rope_parameters": by_kind, local: 3e4})
    assert (read.rope_theta, read.local_rope_theta, read.rope_scaling) == (5e5, 3e4, RopeScaling("linear", 8.0))
    for wrong, message in (
        (full, "rope_type is not one of the kinds of layers"),
        ({**by_kind, "bogus_attention": sliding}, "bogus_attention is not one of the kinds"),
        ({**by_kind, "sliding_attention": {**sliding, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({**by_kind, "full_attention": {**full, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({**by_kind, "sliding_attention": {"rope_type": "linear", "factor": 8.0}}, "sliding layers with a scaling"),
        ({**by_kind, "sliding_attention": {**sliding, "factor": 8.0}}, "factor says nothing in the type default"),
        ({**by_kind, "sliding_attention": {**sliding, "rope_theta": 2e4}}, "rope_theta is 20000.0 .* 30000.0 at"),
    ):
        with pytest.raises(UserError, match=message):
            family(name).from_hf({"rope_parameters": wrong, local: 3e4})
